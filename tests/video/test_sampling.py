"""Which frames make a clip."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blueberry_video.video.sampling import fixed_fps, random_window, uniform, windows


def test_uniform_spans_the_video():
    assert uniform(9, 5) == [0, 2, 4, 6, 8]
    assert uniform(16, 16) == list(range(16))
    assert uniform(9, 1) == [4]


def test_random_windows_keep_the_stride_and_reach_both_ends():
    drawn = [random_window(12, 4, np.random.default_rng(seed), stride=3) for seed in range(60)]
    assert {tuple(np.diff(window)) for window in drawn} == {(3, 3, 3)}
    assert {window[0] for window in drawn} == {0, 1, 2}
    assert random_window(12, 4, np.random.default_rng(5)) == random_window(12, 4, np.random.default_rng(5))


def test_windows_are_spread_evenly():
    assert windows(12, 4, num_clips=3) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert windows(12, 4, num_clips=1) == [[4, 5, 6, 7]]
    assert windows(4, 4, num_clips=2) == [[0, 1, 2, 3]] * 2


def test_fixed_fps_follows_the_clock_where_the_rate_varies():
    timestamps = [0.0, 0.1, 0.2, 0.3, 1.3, 2.3, 3.3]  # 10 fps, then 1 fps
    assert fixed_fps(timestamps, 4, fps=1 / 1.1) == [0, 3, 4, 6]  # at 0, 1.1, 2.2 and 3.3 s
    assert fixed_fps(timestamps, 7, fps=2) == [1, 3, 3, 4, 4, 5, 5]  # 0.15 s to 3.15 s: the middle of the video


def test_fixed_fps_of_a_steady_video_is_a_stride():
    for late in (0.0, 3600.0):  # streams may begin at any time
        timestamps = [late + i / 30 for i in range(31)]
        assert fixed_fps(timestamps, 11, fps=10) == list(range(0, 31, 3))


def test_fixed_fps_draws_its_start():
    timestamps = [i / 10 for i in range(100)]
    starts = {fixed_fps(timestamps, 4, fps=5, rng=np.random.default_rng(seed))[0] for seed in range(50)}
    assert len(starts) > 20
    assert max(starts) <= 93


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_indices_lie_in_the_video_in_order(total: int, num_frames: int, stride: int, num_clips: int, seed: int):
    rng = np.random.default_rng(seed)
    clips = [uniform(total, num_frames, pad=True), random_window(total, num_frames, rng, stride, pad=True)]
    clips += windows(total, num_frames, num_clips, stride, pad=True)
    clips += [fixed_fps([i / 7 for i in range(total)], num_frames, 7 / stride, rng, pad=True)]
    assert all(len(clip) == num_frames and clip == sorted(clip) for clip in clips)
    assert all(0 <= i < total for clip in clips for i in clip)


def test_too_short_a_video_is_refused_unless_padded():
    rng = np.random.default_rng(0)
    message = r"num_frames=8 with stride=2 needs a video of 15 frames, but this one has 10: lower .* pad=true"
    with pytest.raises(ValueError, match=message):
        random_window(10, 8, rng, stride=2)
    with pytest.raises(ValueError, match=message):
        windows(10, 8, num_clips=3, stride=2)
    with pytest.raises(ValueError, match="needs a video of 16 frames, but this one has 10"):
        uniform(10, 16)
    with pytest.raises(ValueError, match=r"num_frames=16 at fps=5 last 3 s, but the video's 10 frames span 0.9 s"):
        fixed_fps([i / 10 for i in range(10)], 16, fps=5)
    assert random_window(4, 6, rng, pad=True) == [0, 1, 2, 3, 3, 3]
    assert windows(4, 3, num_clips=2, stride=2, pad=True) == [[0, 2, 3]] * 2
    assert fixed_fps([0.0, 0.1, 0.2], 5, fps=10, pad=True) == [0, 1, 2, 2, 2]


@pytest.mark.parametrize("bad", [{"num_frames": 0}, {"total": 0}, {"stride": 0}])
def test_counts_below_one_are_refused(bad: dict):
    with pytest.raises(ValueError, match="each must be at least 1"):
        random_window(**{"total": 5, "num_frames": 2, "rng": np.random.default_rng(0), **bad})
    with pytest.raises(ValueError, match="num_clips=0"):
        windows(5, 2, num_clips=0)
    with pytest.raises(ValueError, match="fps=0"):
        fixed_fps([0.0, 1.0], 2, fps=0)
