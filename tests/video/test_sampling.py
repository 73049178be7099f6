"""Tests of frame sampling: fixed-length clips and videos of any length."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blueberry_video.video.errors import VideoError
from blueberry_video.video.sampling import (
    ClipSampling,
    SamplingOptions,
    by_scores,
    candidate_frames,
    change_scores,
    choose,
    choose_clip,
    every_interval,
    fixed_fps,
    frame_rate,
    prefer_keyframes,
    random_window,
    segments,
    spread,
    time_range,
    uniform,
    windows,
)


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


def published_segments(total: int, fpc: int, clips: int, fstp: int, rng: np.random.Generator) -> list[int]:
    """The rule of V-JEPA's dataset with overlapping clips and random starts, written with its quantities."""
    clip_len, partition_len, found = fpc * fstp, total // clips, []
    for i in range(clips):
        if partition_len > clip_len:
            end = clip_len + int(rng.integers(partition_len - clip_len))
            indices = np.clip(np.linspace(end - clip_len, end, num=fpc), end - clip_len, end - 1).astype(np.int64)
            found.extend(indices + i * partition_len)
        else:
            sample_len = min(clip_len, total) - 1
            indices = np.linspace(0, sample_len, num=sample_len // fstp)
            indices = np.concatenate((indices, np.ones(fpc - sample_len // fstp) * sample_len))
            indices = np.clip(indices, 0, sample_len - 1).astype(np.int64)
            step = (total - clip_len) // (clips - 1) if total > clip_len else 0
            found.extend(indices + i * step)
    return [int(index) for index in found]


@pytest.mark.parametrize("total", [300, 129, 128, 100, 64, 40, 9])
@pytest.mark.parametrize(("clips", "stride"), [(8, 4), (2, 4), (2, 1)])
def test_segments_equal_the_published_rule(total, clips, stride):
    for seed in range(5):
        drawn = segments(total, 16, clips, np.random.default_rng(seed), stride, pad=True)
        assert drawn == published_segments(total, 16, clips, stride, np.random.default_rng(seed))
        assert len(drawn) == 16 * clips
        assert 0 <= min(drawn) <= max(drawn) < total


def test_segments_are_random_within_their_parts():
    options = ClipSampling("segments", 4, stride=2, num_clips=3)
    drawn = [choose_clip(np.arange(90) / 10, options, np.random.default_rng(seed)) for seed in range(200)]
    for number in range(3):
        starts = {clip[4 * number] for clip in drawn}
        assert starts == set(range(30 * number, 30 * number + 22))
    with pytest.raises(ValueError, match=r"num_frames=4 with stride=2.*7 frames"):
        choose_clip(np.arange(5) / 10, options)


def test_fixed_fps_uses_timestamps_at_a_variable_frame_rate():
    timestamps = [0.0, 0.1, 0.2, 0.3, 1.3, 2.3, 3.3]  # 10 fps, then 1 fps
    assert fixed_fps(timestamps, 4, fps=1 / 1.1) == [0, 3, 4, 6]  # at 0, 1.1, 2.2 and 3.3 s
    assert fixed_fps(timestamps, 7, fps=2) == [1, 3, 3, 4, 4, 5, 5]  # 0.15 s to 3.15 s: the middle of the video


def test_fixed_fps_at_a_constant_frame_rate_is_a_stride():
    for late in (0.0, 3600.0):  # streams may start at any time
        timestamps = [late + i / 30 for i in range(31)]
        assert fixed_fps(timestamps, 11, fps=10) == list(range(0, 31, 3))


def test_fixed_fps_draws_the_start_from_rng():
    timestamps = [i / 10 for i in range(100)]
    starts = {fixed_fps(timestamps, 4, fps=5, rng=np.random.default_rng(seed))[0] for seed in range(50)}
    assert len(starts) > 20
    assert max(starts) <= 93


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_clip_indices_are_sorted_and_in_range(total: int, num_frames: int, stride: int, num_clips: int, seed: int):
    rng = np.random.default_rng(seed)
    clips = [uniform(total, num_frames, pad=True), random_window(total, num_frames, rng, stride, pad=True)]
    clips += windows(total, num_frames, num_clips, stride, pad=True)
    clips += [fixed_fps([i / 7 for i in range(total)], num_frames, 7 / stride, rng, pad=True)]
    assert all(len(clip) == num_frames and clip == sorted(clip) for clip in clips)
    assert all(0 <= i < total for clip in clips for i in clip)


def test_choose_clip_selects_the_sampler():
    times = every(10, 31)
    assert choose_clip(times, ClipSampling("uniform", 4)) == uniform(31, 4)
    assert choose_clip(times, ClipSampling("fixed_fps", 4, fps=5)) == fixed_fps(times.tolist(), 4, 5)
    options = ClipSampling("multi_clip", 4, stride=2, num_clips=3)
    assert [choose_clip(times, options, window=k) for k in range(3)] == windows(31, 4, 3, stride=2)
    rng, same = np.random.default_rng(7), np.random.default_rng(7)
    assert choose_clip(times, ClipSampling("random", 4, stride=3), rng) == random_window(31, 4, same, stride=3)


def test_short_videos_raise_unless_padded():
    rng = np.random.default_rng(0)
    message = r"num_frames=8 with stride=2 .*\b15 frames.*\b10\b.*pad=true"
    with pytest.raises(ValueError, match=message):
        random_window(10, 8, rng, stride=2)
    with pytest.raises(ValueError, match=message):
        windows(10, 8, num_clips=3, stride=2)
    with pytest.raises(ValueError, match=r"num_frames=16 with stride=1 .*\b16 frames.*\b10\b.*pad=true"):
        uniform(10, 16)
    with pytest.raises(ValueError, match=r"num_frames=16 at fps=5 .*\b3 s.*\b10 frames.*\b0\.9 s.*pad=true"):
        fixed_fps([i / 10 for i in range(10)], 16, fps=5)
    assert random_window(4, 6, rng, pad=True) == [0, 1, 2, 3, 3, 3]
    assert windows(4, 3, num_clips=2, stride=2, pad=True) == [[0, 2, 3]] * 2
    assert fixed_fps([0.0, 0.1, 0.2], 5, fps=10, pad=True) == [0, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 0}, "num_frames=0 with stride=1 .*5 frames"),
        ({"total": 0}, "num_frames=2 with stride=1 .* 0 frames"),
        ({"stride": 0}, "num_frames=2 with stride=0 .*5 frames"),
    ],
)
def test_counts_below_one_raise(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        random_window(**{"total": 5, "num_frames": 2, "rng": np.random.default_rng(0), **change})
    with pytest.raises(ValueError, match="num_clips=0"):
        windows(5, 2, num_clips=0)
    with pytest.raises(ValueError, match="fps=0 and num_frames=2"):
        fixed_fps([0.0, 1.0], 2, fps=0)


def every(rate: float, total: int, start: float = 0.0) -> np.ndarray:
    return start + np.arange(total) / rate


@pytest.mark.parametrize(
    ("total", "rate", "count"), [(300, 30, 20), (108_000, 30, 768), (5400, 30, 360), (7, 30, 4), (240, 24, 20)]
)
@pytest.mark.parametrize("start", [0.0, -0.08, 3600.0])
def test_counts_equal_reference_values(total: int, rate: float, count: int, start: float):
    chosen = choose(every(rate, total, start), SamplingOptions())
    assert len(chosen) == count
    assert (chosen[0], chosen[-1]) == (0, total - 1)
    # timestamps rounded to milliseconds yield the same rate
    assert choose(every(rate, total, start).round(3), SamplingOptions()) == chosen


def test_frame_rate_of_rounded_timestamps_is_exact():
    for rate in (24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 60.0):
        assert frame_rate(every(rate, 1000, 17.3)) == rate
        assert frame_rate(every(rate, 1000).round(3)) == rate
    assert frame_rate(every(7.25, 200)) == pytest.approx(7.25, rel=1e-12)
    assert frame_rate(every(0.01, 200)) == pytest.approx(0.01, rel=1e-12)
    with pytest.raises(VideoError, match=r"\b3 frames.*\b2\.0 s"):
        frame_rate(np.full(3, 2.0))


def test_last_frame_repeats_up_to_frame_factor():
    assert choose(np.array([5.0]), SamplingOptions()) == [0, 0]
    assert choose(np.array([5.0]), SamplingOptions(frame_factor=1)) == [0]
    assert choose(np.array([5.0]), SamplingOptions(num_frames=2)) == [0, 0]
    for strategy in ("duration", "keyframes", "all"):
        assert choose(np.array([5.0]), SamplingOptions(sampling=strategy)) == [0, 0]
    assert choose(every(30, 3), SamplingOptions(frame_factor=4, max_frames=8)) == [0, 1, 2, 2]
    assert choose(every(30, 5), SamplingOptions(num_frames=8, pad_frames=True)) == [0, 1, 2, 3, 4, 4, 4, 4]


def test_spacings():
    assert spread(0, 9, 4, "inclusive") == [0, 3, 6, 9]
    assert spread(0, 9, 4, "linspace") == [0, 3, 6, 9]
    assert spread(0, 9, 4, "arange") == [0, 2, 5, 7]
    assert spread(0, 9, 4, "steps") == [0, 2, 5, 7]
    assert spread(0, 9, 4, "centres") == [1, 3, 6, 8]
    assert spread(5, 14, 4, "steps") == [5, 7, 10, 12]


def test_time_ranges_use_timestamps():
    times = np.array([10.0, 10.1, 10.2, 10.3, 11.3, 12.3, 13.3])  # 10 fps, then 1 fps
    assert time_range(times) == (0, 6)
    assert time_range(times, 0.1, 1.3) == (1, 4)  # exact timestamps: rounding drops no frame
    assert time_range(times, 0.11, 1.29) == (2, 3)
    assert time_range(times, 3.3) == (6, 6)
    options = SamplingOptions(sampling="all", video_start=0.15, video_end=2.5, frame_factor=1)
    assert choose(times, options) == [2, 3, 4, 5]
    assert time_range(times, 0.35, 1.2) == (3, 3)  # the frame on screen
    assert time_range(times, 2.4, 2.5) == (5, 5)
    held = SamplingOptions(sampling="uniform", num_frames=4, pad_frames=True, video_start=0.35, video_end=1.2)
    assert choose(times, held) == [3, 3, 3, 3]
    assert time_range(times, 3.5, 4.0) == (6, 6)  # the last frame, on screen for the mean interval of 0.55 s
    with pytest.raises(ValueError, match=r"video_start=3\.9 and video_end=4.*0 to 3\.85 s"):
        time_range(times, 3.9, 4.0)
    assert time_range(times, 3.9, 4.0, duration=5.3) == (6, 6)
    with pytest.raises(ValueError, match=r"video_start=3\.5 and video_end=None.*0 to 3\.4 s"):
        time_range(times, 3.5, duration=3.4)
    with pytest.raises(ValueError, match="video_start=5"):
        choose(times, SamplingOptions(video_start=5.0))


def test_counts_depend_on_the_time_range():
    options = SamplingOptions(video_start=2.0, video_end=5.999)
    chosen = choose(every(30, 3000), options)
    assert len(chosen) == 8  # 4 s, not 100
    assert (chosen[0], chosen[-1]) == (60, 179)
    assert choose(every(30, 3000), SamplingOptions(video_start=2.0, video_end=2.0)) == [60, 60]


def test_by_time_spaces_frames_evenly_in_time():
    times = np.concatenate([np.arange(60) / 30, 2 + np.arange(10) / 5])  # 2 s at 30 fps, then 2 s at 5 fps
    by_index = choose(times, SamplingOptions(fps=2.0))
    by_time = choose(times, SamplingOptions(fps=2.0, by_time=True))
    assert len(by_index) == len(by_time) == 6
    assert sum(i >= 60 for i in by_index) == 1  # half of the duration, a seventh of the frames
    behind = np.linspace(times[0], times[-1], len(by_time)) - times[by_time]
    assert 0 <= behind.min() <= behind.max() < 0.2  # on screen, for up to a fifth of a second
    assert choose(times, SamplingOptions(num_frames=4, by_time=True)) == [0, 38, 62, 69]
    # the count of a range follows the average rate of the video, or with by_time the duration of the range
    late = {"fps": 2.5, "video_start": 2.0, "min_frames": 2}
    assert choose(times, SamplingOptions(**late)) == [60, 69]
    assert choose(times, SamplingOptions(**late, by_time=True)) == [60, 63, 66, 69]


@given(st.integers(2, 400), st.sampled_from([7.3, 24.0, 29.97, 60.0]), st.integers(2, 20))
@settings(max_examples=40, deadline=None)
def test_by_time_is_linspace_rounded_down_at_a_constant_rate(total: int, rate: float, half: int):
    count = min(2 * half, total // 2 * 2)
    by_time = choose(every(rate, total, 9.0), SamplingOptions(num_frames=count, by_time=True))
    assert by_time == [i * (total - 1) // (count - 1) for i in range(count)]
    by_rate = choose(every(rate, total, 9.0), SamplingOptions(fps=1.7, min_frames=2, by_time=True))
    assert len(by_rate) == len(choose(every(rate, total, 9.0), SamplingOptions(fps=1.7, min_frames=2)))


def test_duration_takes_one_frame_per_interval():
    chosen = choose(every(30, 30 * 40), SamplingOptions(sampling="duration"))
    assert len(chosen) == 10
    assert (chosen[0], chosen[-1]) == (0, 1199)
    assert len(choose(every(30, 30 * 40), SamplingOptions(sampling="duration", base_interval=2.0))) == 20
    assert len(choose(every(30, 60), SamplingOptions(sampling="duration"))) == 4  # at least min_frames
    assert every_interval(every(1.0, 11), 3.0, min_frames=1, frame_factor=1) == [0, 3, 6, 10]  # 11 s, not 10
    assert every_interval(np.array([0.0, 1.0, 2.0, 9.0, 10.0]), 2.5, min_frames=1) == [0, 2, 2, 4]


def test_keyframes_are_taken_first():
    options = SamplingOptions(sampling="keyframes", num_frames=4)
    assert choose(every(30, 100), options, keyframes=[0, 10, 20, 30, 40, 50, 60]) == [0, 20, 40, 60]
    assert choose(every(30, 101), options, keyframes=[0]) == [0, 25, 50, 100]
    assert choose(every(30, 101), options, keyframes=[40]) == [0, 40, 70, 100]
    assert choose(every(30, 101), options, keyframes=[30, 35]) == [30, 35, 67, 100]
    assert choose(every(30, 101), options, keyframes=[45, 50]) == [0, 45, 50, 100]
    assert choose(every(30, 101), options) == [0, 25, 50, 100]
    without_count = SamplingOptions(sampling="keyframes", max_frames=6)
    assert choose(every(30, 100), without_count, keyframes=range(0, 100, 20)) == [0, 20, 40, 60, 80, 99]
    assert len(choose(every(30, 100), without_count, keyframes=range(0, 100, 5))) == 6
    inside = SamplingOptions(sampling="keyframes", video_start=1.0, num_frames=2)
    assert choose(every(30, 100), inside, keyframes=[0, 44, 66, 99]) == [44, 99]


@given(st.sets(st.integers(20, 79)), st.integers(1, 70))
@settings(max_examples=60, deadline=None)
def test_keyframes_are_complete_or_thinned(keyframes: set[int], count: int):
    chosen = prefer_keyframes(sorted(keyframes), 20, 79, count)
    assert len(chosen) == min(count, 60)
    assert chosen == sorted(set(chosen))
    assert set(chosen) >= keyframes if count >= len(keyframes) else set(chosen) <= keyframes
    assert all(20 <= i <= 79 for i in chosen)


def test_by_scores_takes_more_frames_at_high_scores():
    scores = torch.zeros(101)
    scores[50] = 1.0  # scene cut
    chosen = by_scores(scores, range(101), 9, uniform_share=0.5)
    assert chosen[0] == 0
    assert chosen[-1] == 100
    assert {49, 50} <= set(chosen)  # both sides of the cut
    assert sum(45 <= i <= 55 for i in chosen) >= 4
    assert sum(45 <= i <= 55 for i in by_scores(scores, range(101), 9, uniform_share=1.0)) == 1  # evenly
    assert by_scores(torch.zeros(101), range(0, 1010, 10), 5) == [0, 250, 500, 750, 1000]
    assert by_scores([0.0, 1, 1, 0, 0, 0, 0, 0], range(8), 4, uniform_share=0.0) == [0, 1, 2, 7]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.floats(0, 1), st.integers(0, 59), st.integers(1, 5))
@settings(max_examples=80, deadline=None)
def test_by_scores_is_sorted_and_includes_both_ends(scores: list[float], share: float, fewer: int, step: int):
    candidates = range(3, 3 + step * len(scores), step)
    count = max(1, len(scores) - fewer)
    chosen = by_scores(scores, candidates, count, share)
    assert len(chosen) == count
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(candidates)
    assert chosen[0] == candidates[0]
    assert chosen[-1] == candidates[-1] or count == 1
    assert by_scores(torch.tensor(scores, dtype=torch.float64), candidates, count, share) == chosen


def test_adaptive_sampling_takes_more_frames_where_the_content_changes():
    options = SamplingOptions(sampling="adaptive", num_frames=8, candidates_per_frame=8)
    times = every(10, 640)
    candidates = candidate_frames(times, options)
    assert len(candidates) == 64
    assert (candidates[0], candidates[-1]) == (0, 639)
    frames = torch.full((64, 3, 9, 16), 90, dtype=torch.uint8)
    for i in range(40, 48):  # eight cuts in an eighth of the duration
        frames[i:] = 30 + 20 * (i - 40)
    chosen = choose(times, options, scores=change_scores(frames))
    assert len(chosen) == 8
    assert sum(candidates[39] <= i <= candidates[48] for i in chosen) >= 5
    assert choose(times, options, scores=change_scores(frames)) == chosen
    with pytest.raises(ValueError, match=r"scores of shape \(3,\) for 64 candidate frames"):
        choose(times, options, scores=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="sampling='adaptive' requires scores"):
        choose(times, options)
    with pytest.raises(ValueError, match="sampling='fps' ignores scores"):
        choose(times, SamplingOptions(), scores=[1.0])
    for bad in ([1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match=r"scores of shape \(2,\) for 2 candidate frames"):
            by_scores(bad, [0, 1], 1)


def test_change_scores_measure_luma_and_chroma():
    frames = torch.zeros(4, 3, 6, 8, dtype=torch.uint8)
    frames[1] = 255  # black to white
    frames[2] = frames[3] = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]
    scores = change_scores(frames)
    assert scores[0] == 0
    assert scores[1] == pytest.approx(1 / 3, abs=1e-5)  # luma only
    assert scores[2] == pytest.approx((0.701 + 0.168736 + 0.5) / 3, abs=1e-5)
    assert scores[3] == 0
    with pytest.raises(ValueError, match=r"torch\.float32 .*\(4, 3, 6, 8\).*uint8 \(N, 3, h, w\)"):
        change_scores(frames.float())


def test_explicit_indices():
    assert choose(every(30, 10), SamplingOptions(indices=[3, 1, 9])) == [3, 1, 9, 9]
    assert choose(every(30, 10), SamplingOptions(indices=(3, 3), frame_factor=1)) == [3, 3]
    for wrong in ((0, 10), (-1, 2)):
        with pytest.raises(ValueError, match=r"indices=.*\[(10|-1)\].* 0 to 9"):
            choose(every(30, 10), SamplingOptions(indices=wrong))
    with pytest.raises(ValueError, match=r"indices=\[0, 5\] .*\[0\].* 3 to 9"):
        choose(every(10, 10), SamplingOptions(indices=(0, 5), video_start=0.3))


def test_all_frames_are_limited_by_max_frames():
    assert choose(every(30, 5), SamplingOptions(sampling="all")) == [0, 1, 2, 3, 4, 4]
    with pytest.raises(ValueError, match=r"sampling='all' .*\b1000 frames.*max_frames=768"):
        choose(every(30, 1000), SamplingOptions(sampling="all"))


@given(
    st.integers(1, 3000),
    st.sampled_from([1.0, 8.3, 24000 / 1001, 30.0, 60.0]),
    st.sampled_from([0.1, 1.0, 2.0, 24.0]),
    st.integers(1, 20),
    st.integers(4, 400),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["fps", "duration", "keyframes", "adaptive"]),
)
@settings(max_examples=150, deadline=None)
def test_counts_respect_limits_and_frames_are_sorted(
    total: int, rate: float, fps: float, least: int, most: int, factor: int, strategy: str
):
    options = SamplingOptions(
        sampling=strategy, fps=None if strategy == "duration" else fps, min_frames=least, max_frames=most,
        frame_factor=factor,
    )  # fmt: skip
    times = every(rate, total, 4.0)
    scores = torch.ones(len(candidate_frames(times, options))) if strategy == "adaptive" else None
    chosen = choose(times, options, keyframes=range(0, total, 12), scores=scores)
    assert len(chosen) % factor == 0
    assert chosen == sorted(chosen)
    assert 0 <= chosen[0] <= chosen[-1] < total
    assert len(chosen) <= max(most, factor)
    assert len(chosen) >= min(least, most - most % factor, total - total % factor)
    if strategy != "keyframes":
        assert chosen[0] == 0
        assert chosen[-1] == total - 1 or len(chosen) == 1
        assert strategy == "duration" or len(set(chosen)) == min(len(chosen), total)
    assert choose(times, options, keyframes=range(0, total, 12), scores=scores) == chosen


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sampling": "random"}, r"sampling='random' .*fps, uniform"),
        ({"spacing": "even"}, r"spacing='even' .*inclusive"),
        ({"fps": 1.0, "num_frames": 8}, r"fps=1\.0 and num_frames=8 "),
        ({"num_frames": 8, "indices": [1]}, r"num_frames=8 and indices=\(1,\)"),
        ({"sampling": "uniform"}, r"sampling='uniform' .*num_frames"),
        ({"sampling": "duration", "fps": 1.0}, r"sampling='duration' .*fps=1\.0"),
        ({"fps": 0.0}, r"fps=0\.0 .*above 0"),
        ({"fps": float("nan")}, r"fps=nan .*above 0"),
        ({"base_interval": -1.0}, r"base_interval=-1\.0 .*above 0"),
        ({"num_frames": 1}, r"num_frames=1 .*at least 2"),
        ({"max_frames": 1}, r"max_frames=1 .*at least 2"),
        ({"min_frames": 0}, r"min_frames=0 .*at least 1"),
        ({"uniform_share": 1.5}, r"uniform_share=1\.5 .*0 to 1"),
        ({"video_start": 3.0, "video_end": 2.0}, r"video_start=3\.0 and video_end=2\.0"),
        ({"video_start": -1.0}, r"video_start=-1\.0 and video_end=None"),
    ],
)
def test_invalid_options_raise(wrong: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**wrong)


@pytest.mark.parametrize("times", [[], [0.0, 2.0, 1.0], [0.0, float("nan")], [[0.0, 1.0]]])
def test_invalid_timestamps_raise_video_error(times: list):
    with pytest.raises(VideoError, match=r"timestamps of .*finite seconds"):
        choose(np.array(times), SamplingOptions())
