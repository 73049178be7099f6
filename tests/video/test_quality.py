"""Quality statistics on clips with known values."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blueberry_video.video.errors import BrokenVideoError, FetchError
from blueberry_video.video.pool import Outcome
from blueberry_video.video.quality import Stopwatch, coverage, error_rates, frame_quality, peak_memory, wandb_table


def duplicate_share(frames: Tensor) -> float:
    return frame_quality(frames)["duplicate_share"]


def black_share(frames: Tensor) -> float:
    return frame_quality(frames)["black_share"]


def gray(*levels: int, height: int = 60, width: int = 80) -> Tensor:
    """One frame per level."""
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, height, width).clone()


def test_coverage_of_a_part():
    assert coverage([2.0, 3.0, 7.0], first=0.0, last=10.0) == {"coverage": 0.5, "largest_gap": 4.0}
    assert coverage([7.0, 2.0, 3.0], first=0.0, last=10.0) == {"coverage": 0.5, "largest_gap": 4.0}  # any order
    assert coverage([0.0, 1.0], first=0.0, last=10.0) == {"coverage": 0.1, "largest_gap": 9.0}  # the end counts
    assert coverage([9.0, 10.0], first=0.0, last=10.0) == {"coverage": 0.1, "largest_gap": 9.0}  # and the start


def test_coverage_of_a_whole_video_and_of_a_still():
    whole = coverage(torch.linspace(3600, 3610, 11, dtype=torch.float64), first=3600.0, last=3610.0)
    assert whole == {"coverage": 1.0, "largest_gap": 1.0}
    assert coverage([5.0], first=5.0, last=5.0) == {"coverage": 1.0, "largest_gap": 0.0}
    assert coverage([5.0], first=0.0, last=8.0) == {"coverage": 0.0, "largest_gap": 5.0}


def test_timestamps_outside_extend_the_interval():
    assert coverage([-1.0, 5.0], first=0.0, last=4.0) == {"coverage": 1.0, "largest_gap": 6.0}


@given(st.lists(st.floats(0, 100), min_size=1, max_size=9))
def test_coverage_is_between_zero_and_one(timestamps: list[float]):
    found = coverage(timestamps, 0.0, 100.0)
    assert 0 <= found["coverage"] <= 1
    assert 100 / (len(timestamps) + 1) - 1e-9 <= found["largest_gap"] <= 100


def test_invalid_coverage_arguments_raise():
    with pytest.raises(ValueError, match="0 timestamps"):
        coverage([], 0.0, 1.0)
    with pytest.raises(ValueError, match=r"first=1.0, last=0.0"):
        coverage([0.5], 1.0, 0.0)


def test_duplicates_are_adjacent_equal_frames():
    assert duplicate_share(gray(10, 10, 10, 200, 10)) == 0.5  # of four pairs, the first two
    assert duplicate_share(gray(10, 60, 110)) == 0.0
    assert duplicate_share(gray(7)) == 0.0


def test_duplicates_ignore_codec_noise_but_not_small_motion():
    still = gray(100, 100, 100, height=360, width=640)
    noisy = (still.int() + torch.randint(-2, 3, still.shape)).to(torch.uint8)
    assert duplicate_share(noisy) == 1.0
    moving = still.clone()
    for i in range(3):
        moving[i, :, 100:160, 40 * i : 40 * i + 60] = 255
    assert duplicate_share(moving) == 0.0


def test_frames_of_different_colors_are_no_duplicates():
    frames = gray(0, 0)
    frames[0, 0], frames[1, 1] = 255, 255  # red, then green
    assert duplicate_share(frames) == 0.0


def test_black_frames():
    assert black_share(gray(0, 20, 40, 255)) == 0.5
    subtitles = gray(0, height=720, width=1280)
    subtitles[..., 650:690, 300:500] = 255  # 0.9 % of the picture
    assert black_share(subtitles) == 1.0
    subtitles[..., 600:690, 300:900] = 255  # 5.9 %
    assert black_share(subtitles) == 0.0
    blue = gray(0)
    blue[:, 2] = 255  # luma 29
    assert black_share(blue) == 0.0


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 500), (31, 33), (720, 1280)])
def test_frame_quality_for_every_size(height: int, width: int):
    frames = gray(0, 0, 128, height=height, width=width)
    expected = {"duplicate_share": 0.5, "black_share": pytest.approx(2 / 3), "contrast": 0.0}
    assert frame_quality(frames) == expected


def test_contrast():
    frames = gray(0, 0)
    frames[:, :, :, 40:] = 200  # half dark, half bright: a standard deviation of 100 levels
    assert frame_quality(frames)["contrast"] == pytest.approx(100, abs=2)


def test_frame_quality_of_many_frames():
    frames = gray(*[i % 200 for i in range(100)], height=4, width=4)
    assert duplicate_share(frames) == 0.0
    assert black_share(frames) == pytest.approx(0.26)


@pytest.mark.parametrize("frames", [torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, 3, dtype=torch.uint8)])
def test_invalid_frames_raise(frames: Tensor):
    with pytest.raises(ValueError, match=rf"{frames.dtype} {re.escape(str(tuple(frames.shape)))}.*uint8"):
        frame_quality(frames)


def test_the_times_of_a_stage_are_summed():
    watch = Stopwatch()
    for _ in range(2):
        with watch.stage("decode"):
            time.sleep(0.02)
    with watch.stage("resize"):
        pass
    assert list(watch.seconds) == ["decode", "resize"]
    assert 0.04 <= watch.seconds["decode"] < 1
    assert 0 <= watch.seconds["resize"] < 0.02


def test_a_stage_that_fails_is_timed():
    watch = Stopwatch()

    def fail() -> None:
        with watch.stage("fetch"):
            time.sleep(0.01)
            raise FetchError("gone")

    with pytest.raises(FetchError):
        fail()
    assert watch.seconds["fetch"] >= 0.01


def test_peak_memory_never_decreases():
    script = (
        "from blueberry_video.video.quality import peak_memory\n"
        "before = peak_memory()\nbig = bytearray(b'x') * (200 << 20)\nwith_it = peak_memory()\ndel big\n"
        "print(before, with_it, peak_memory())"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    before, with_it, after = map(int, out.split())
    assert 50 << 20 < before < 4 << 30
    assert with_it - before > 150 << 20
    assert after - before > 150 << 20  # Linux counts within a few pages, so not exactly with_it
    assert peak_memory() > 50 << 20


def test_error_rates():
    outcomes = [
        "a result",
        FetchError("slow"),
        BrokenVideoError("cut"),
        "a result",
        BrokenVideoError("cut"),
        None,
        1,
        {},
    ]
    assert error_rates(outcomes) == {"BrokenVideoError": 0.25, "FetchError": 0.125}
    assert list(error_rates(outcomes)) == ["BrokenVideoError", "FetchError"]
    finished = [Outcome(i, "a.mp4", "value", error, 0.1, 0) for i, error in enumerate([None, FetchError("x")])]
    assert error_rates(finished) == {"FetchError": 0.5}
    assert error_rates(iter(["a result"])) == {}
    assert error_rates([]) == {}


def test_a_table_has_one_row_per_video():
    wandb = pytest.importorskip("wandb")
    rows = [
        {"video": "a.mp4", "frames": 20, "timing": {"decode": 0.5, "resize": 0.25}, "salvaged": False},
        {"video": Path("b.mp4"), "error": "FetchError", "frames": 8},
    ]
    table = wandb_table(rows)
    assert isinstance(table, wandb.Table)
    assert table.columns == ["video", "frames", "timing/decode", "timing/resize", "salvaged", "error"]
    assert table.data == [["a.mp4", 20, 0.5, 0.25, False, None], ["b.mp4", 8, None, None, None, "FetchError"]]


def test_an_empty_table():
    pytest.importorskip("wandb")
    assert wandb_table([]).data == []
