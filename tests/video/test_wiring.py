"""Settings reach the stages, and times, sizes and counts have their units, in a clip that does not start at 0."""

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch

from blueberry_video.video import (
    LimitError,
    VideoProcessor,
    backends,
    container,
    load_settings,
    process_video,
    stream_video,
)
from blueberry_video.video import process as processing
from blueberry_video.video.pool import Outcome, run_in_processes
from blueberry_video.video.quality import Stopwatch, coverage, frame_quality
from blueberry_video.video.sampling import ClipSampling, choose_clip

START = 7.0
TIMES = [0.0, 0.1, 0.2, 0.5, 0.6, 1.0, 1.1, 1.2, 1.9, 2.0, 2.4, 2.5]  # seconds after the first frame


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of a variable frame rate with its first frame at 7 s, and gray level 20 + 15 i in frame i."""
    path = tmp_path_factory.mktemp("clips") / "late.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 96, 64, "yuv420p", 4
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, seconds in enumerate(TIMES):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 20 + 15 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(1000 * (START + seconds)), Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def frames_of(pixels: torch.Tensor) -> list[int]:
    """Numbers of the frames, from their gray levels."""
    return [round((frame.float().mean().item() - 20) / 15) for frame in pixels]


@pytest.mark.parametrize(
    ("options", "indices"),
    [
        ({"indices": (0, 5, 11)}, (0, 5, 11, 11)),  # the last repeats to fill a group of two
        ({"sampling": "all"}, tuple(range(12))),
        ({"sampling": "all", "video_start": 0.5, "video_end": 1.15}, (3, 4, 5, 6)),
        ({"num_frames": 4, "video_start": 1.0, "video_end": 2.0}, (5, 6, 8, 9)),
        ({"num_frames": 4, "by_time": True}, (0, 4, 7, 11)),
        ({"sampling": "duration", "base_interval": 0.62, "min_frames": 1}, (0, 4, 7, 11)),
    ],
)
def test_times_are_those_of_the_frames_from_the_first_one(clip: Path, options: dict, indices: tuple[int, ...]):
    video = process_video(clip, **options)
    known = video.metadata
    assert known.frame_indices == indices
    assert frames_of(video.pixels) == list(indices)
    assert known.timestamps == pytest.approx([TIMES[i] for i in indices])
    assert known.start_time == pytest.approx(START)
    distinct = sorted(set(indices))
    assert known.sample_fps == pytest.approx((len(distinct) - 1) / (TIMES[distinct[-1]] - TIMES[distinct[0]]))


def test_streamed_frames_have_the_times_of_a_processed_video(clip: Path):
    chunks = list(stream_video(clip, sampling="all", video_start=0.5, video_end=2.1))
    assert [index for chunk in chunks for index in chunk.indices] == list(range(3, 10))
    assert torch.cat([chunk.timestamps for chunk in chunks]).tolist() == pytest.approx(TIMES[3:10])
    assert frames_of(torch.cat([chunk.pixels for chunk in chunks])) == list(range(3, 10))


def test_coverage_is_that_of_the_chosen_range(clip: Path):
    video = process_video(clip, sampling="all", video_start=0.5, video_end=2.0)
    assert video.quality["coverage"] == pytest.approx(1.0)
    assert video.quality["largest_gap"] == pytest.approx(0.7)
    whole = process_video(clip, indices=(3, 9))
    assert whole.quality["coverage"] < 0.7
    assert coverage([3.0, 1.0], 0.0, 5.0) == {"coverage": 0.4, "largest_gap": 2.0}


def test_stages_take_at_most_the_time_of_the_video(clip: Path):
    start = time.perf_counter()
    video = process_video(clip, num_frames=4)
    seconds = time.perf_counter() - start
    assert {"source", "index", "sample", "decode", "resize", "quality", "format"} <= video.timing.keys()
    assert all(value >= 0 for value in video.timing.values())
    assert sum(video.timing.values()) <= seconds
    assert video.quality["frames_per_second"] >= 4 / seconds
    assert video.quality["frames_per_second"] <= 4 / sum(video.timing.values())
    assert 10 * 2**20 < video.quality["peak_memory"] < 64 * 2**30, "bytes"


def test_repeated_stages_are_summed(monkeypatch: pytest.MonkeyPatch):
    now = iter([1.0, 3.0, 10.0, 14.0, 20.0, 28.0])
    monkeypatch.setattr("blueberry_video.video.quality.time.perf_counter", lambda: next(now))
    watch = Stopwatch()
    with watch.stage("a"):
        pass
    with pytest.raises(ValueError, match="bad"), watch.stage("b"):
        raise ValueError("bad")
    with watch.stage("a"):
        pass
    assert watch.seconds == {"a": 10.0, "b": 4.0}


@pytest.mark.parametrize(("missing", "black"), [([], 0.5), ([1], 1 / 3), ([0, 1, 2, 3], 0.5)])
def test_missing_frames_do_not_count_in_the_quality(clip: Path, missing: list[int], black: float):
    processor = VideoProcessor(load_settings("qwen2.5-vl", {"num_frames": 4}))
    video = processor(clip)
    mask = torch.zeros(4, dtype=torch.bool)
    mask[missing] = True
    suspect = torch.tensor([False, True, True, True])
    pixels = video.pixels.clone()
    pixels[1] = 0  # frame 0 of the clip is black, too
    found = processor._quality(replace(video, pixels=pixels, missing=mask, suspect=suspect))
    assert found["missing_share"] == len(missing) / 4
    assert found["suspect_share"] == 0.75
    assert found["black_share"] == pytest.approx(black)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Returns the calls of the process pool, which is replaced by this process."""
    calls: list[tuple[Any, ...]] = []

    def run(function: Callable, items: Any, **options: Any):
        items = list(items)
        calls.append((function, items, options))
        return iter([Outcome(index, item, item, None, 0.0, 0) for index, item in enumerate(items)])

    monkeypatch.setattr(processing, "run_in_processes", run)
    return calls


def test_limits_of_processes_reach_the_pool(started):
    overrides = {"isolate": True, "timeout": 12.5, "process_memory_bytes": 3 * 2**30}
    settings = load_settings("qwen2.5-vl", overrides)
    progress = Counter().update
    processor = VideoProcessor(settings)
    assert [outcome.value for outcome in processor.map(["a", "b"], 5, ordered=False, on_progress=progress)] == [
        "a",
        "b",
    ]
    assert processor("c") == "c"
    (function, items, options), (single, one, alone) = started
    limits = {"timeout": 12.5, "memory_bytes": 3 * 2**30}
    assert (items, options) == (["a", "b"], {**limits, "workers": 5, "ordered": False, "on_progress": progress})
    assert (one, alone) == (["c"], {**limits, "workers": 1, "ordered": True, "on_progress": None})
    for partial in (function, single):
        inner = partial.args[0]
        assert not inner.run.isolate, "a worker starts no workers"
        assert replace(inner, run=replace(inner.run, isolate=True)) == settings


def test_error_of_an_isolated_video_is_raised(monkeypatch: pytest.MonkeyPatch):
    failed = Outcome(0, "c", None, ArithmeticError("odd"), 0.0, 0)
    monkeypatch.setattr(processing, "run_in_processes", lambda *_, **__: iter([failed]))
    with pytest.raises(ArithmeticError, match="odd"):
        process_video("c", isolate=True)


def test_defaults_of_processes():
    run = load_settings("qwen2.5-vl").run
    assert (run.isolate, run.timeout, run.process_memory_bytes) == (False, 300.0, 8 * 2**30)


def test_item_that_cannot_be_pickled_uses_no_time_and_no_memory():
    items = [3, lambda: 0]
    outcomes = list(run_in_processes(abs, items, workers=1, timeout=20, memory_bytes=None))
    assert (outcomes[0].value, type(outcomes[1].error)) == (3, TypeError)
    assert (outcomes[1].seconds, outcomes[1].peak_memory) == (0.0, 0)


@pytest.mark.parametrize(
    ("levels", "is_right"),
    [((40, 200), True), ((42, 198), True), ((43, 200), False), ((40, 197), False), ((40,), False), ((200, 40), False)],
)
def test_backend_must_decode_the_levels_of_a_tiny_clip(levels: tuple[int, ...], is_right: bool, monkeypatch):
    pictures = [torch.full((4, 4, 3), level, dtype=torch.uint8) for level in levels]
    asked = []
    monkeypatch.setitem(backends.READERS, "pyav", lambda video, wanted, device: asked.append(list(wanted)) or pictures)
    failure = backends.backend_failure.__wrapped__("pyav")
    assert asked == [[0, 2]]
    assert (failure is None) == is_right
    assert is_right or "wrong pixels" in failure


@pytest.mark.parametrize(("wanted", "last"), [([0, 2], None), ([1, 4], 3), ([7], 3)])
def test_frame_after_the_end_of_decoding_is_named(wanted: list[int], last: int | None, monkeypatch: pytest.MonkeyPatch):
    frames = [SimpleNamespace(pts=100 + 10 * i) for i in range(4)]
    container: Any = SimpleNamespace(demux=lambda stream: iter(frames))
    monkeypatch.setattr(backends, "picture_test", lambda stream: None)
    monkeypatch.setattr(backends, "video_frames", lambda packet, shows_frame: [packet])
    video: Any = SimpleNamespace(pts=np.arange(100, 200, 10), info=SimpleNamespace(num_frames=10))
    stream: Any = SimpleNamespace(codec_context=SimpleNamespace(name="h264"))
    found = backends._from_start(video, container, stream, wanted)
    if last is None:
        assert list(found) == [frames[i] for i in wanted]
    else:
        with pytest.raises(ValueError, match=rf"frame {wanted[-1]} of 10 .*\b{last}$"):
            list(found)


def test_range_of_a_single_frame(clip: Path):
    video = process_video(clip, sampling="all", video_start=1.9, video_end=1.95)
    assert set(video.metadata.frame_indices) == {8}
    assert video.metadata.timestamps[0] == pytest.approx(1.9)
    assert video.metadata.sample_fps == 0.0
    with pytest.raises(ValueError, match=r"video_start=2\.6 and video_end=2\.9 .*12 frames .*2\.6 s"):
        process_video(clip, sampling="all", video_start=2.6, video_end=2.9)


def test_large_frames_are_measured_on_every_few_pixels():
    frames = torch.zeros(1, 3, 512, 256, dtype=torch.uint8)
    frames[..., ::4, ::2] = 200  # every fourth row and every second column
    assert frame_quality(frames)["contrast"] == pytest.approx(0.0, abs=1e-4)
    frames = torch.zeros(1, 3, 127, 127, dtype=torch.uint8)
    frames[..., ::2] = 200
    assert frame_quality(frames)["contrast"] > 1


def test_environment_of_a_worker(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MY_VARIABLE", "kept")
    names = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "MY_VARIABLE", "BLUEBERRY_VIDEO_WORKER_STARTING", "TMPDIR"]
    outcomes = list(run_in_processes(os.getenv, names, workers=1, timeout=60, memory_bytes=None))
    *values, folder = [outcome.value for outcome in outcomes]
    assert values == ["1", "1", "kept", None]
    assert Path(folder).name.startswith("worker_")
    assert not Path(folder).exists(), "removed with the worker"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_bytes": 100}, "max_bytes=100"),
        ({"max_frame_pixels": 96 * 64 - 1}, f"max_frame_pixels={96 * 64 - 1}"),
        ({"max_decoded_pixels": 96 * 64, "sampling": "adaptive", "num_frames": 4}, "max_decoded_pixels"),
        ({"max_memory_bytes": 1000}, "max_memory_bytes=1000"),
    ],
)
def test_limits_reach_their_stage(clip: Path, options: dict, error: str):
    with pytest.raises(LimitError, match=error):
        process_video(clip, **options)


@pytest.mark.parametrize(("options", "caches"), [({"cache_memory_bytes": 2**24}, True), ({}, False)])
def test_memory_alone_caches_videos(clip: Path, options: dict, caches: bool):
    processor = VideoProcessor(load_settings("qwen2.5-vl", {"num_frames": 4, **options}))
    assert [processor(clip).cached for _ in range(2)] == [False, caches]


def test_folder_alone_caches_videos(clip: Path, tmp_path: Path):
    options = {"num_frames": 4, "cache_folder": str(tmp_path / "cache"), "cache_memory_bytes": 0}
    first, second = (process_video(clip, **options) for _ in range(2))
    assert (first.cached, second.cached) == (False, True)
    assert torch.equal(first.pixels, second.pixels)
    assert second.metadata == first.metadata
    assert not process_video(clip, **{**options, "num_frames": 6}).cached, "other settings"


@pytest.mark.parametrize(
    ("options", "total", "expected"),
    [
        (ClipSampling("uniform", 4), 10, [0, 3, 6, 9]),
        (ClipSampling("uniform", 1), 10, [5]),
        (ClipSampling("uniform", 5, pad=True), 3, [0, 1, 2, 2, 2]),
        (ClipSampling("random", 4, stride=3), 10, [0, 3, 6, 9]),
        (ClipSampling("random", 4, stride=3, pad=True), 8, [0, 3, 6, 7]),
        (ClipSampling("multi_clip", 3, stride=2, num_clips=1), 10, [2, 4, 6]),
        (ClipSampling("multi_clip", 3, stride=2, num_clips=3), 10, [5, 7, 9]),
        (ClipSampling("multi_clip", 3, stride=2, num_clips=3, pad=True), 4, [0, 2, 3]),
        (ClipSampling("fixed_fps", 3, fps=2.0), 12, [4, 7, 7]),  # displayed at 0.75, 1.25 and 1.75 s
        (ClipSampling("fixed_fps", 6, fps=2.0), 12, [0, 3, 5, 7, 9, 11]),
        (ClipSampling("fixed_fps", 6, fps=2.0, pad=True), 6, [0, 3, 5, 5, 5, 5]),
    ],
    ids=str,
)
def test_frames_of_a_clip_of_a_variable_rate(options: ClipSampling, total: int, expected: list[int]):
    for start in (0.0, START):
        assert choose_clip(np.array(TIMES[:total]) + start, options, window=options.num_clips - 1) == expected


def test_start_of_a_random_clip_is_drawn_from_all():
    starts = {
        choose_clip(np.array(TIMES), ClipSampling("random", 3, stride=4), np.random.default_rng(seed))[0]
        for seed in range(60)
    }
    assert starts == {0, 1, 2, 3}


def test_short_video_raises_without_pad():
    clips = (ClipSampling("uniform", 5), ClipSampling("random", 3, stride=2), ClipSampling("fixed_fps", 4, fps=2.0))
    for options in clips:
        with pytest.raises(ValueError, match=rf"num_frames={options.num_frames}\b.*pad=true"):
            choose_clip(np.array(TIMES[:4]), options)


@pytest.mark.parametrize(("first", "keys"), [(None, []), (None, [0]), (SimpleNamespace(), [])])
def test_stream_without_a_frame_or_keyframes_raises(first: Any, keys: list[int]):
    unused: Any = None
    with pytest.raises(ValueError, match="no frame of the video stream"):
        container._with_info(Path("a.mp4"), "a.mp4", unused, unused, first, None, np.array(keys), 0)
