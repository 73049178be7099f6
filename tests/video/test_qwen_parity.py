"""Parity of frame indices, sizes and pixels with qwen-vl-utils and transformers.

Both import torchvision, which is optional: qwen-vl-utils runs with stub modules, and the pure functions of transformers
are extracted from their source files.
"""

import ast
import contextlib
import importlib
import importlib.util
import math
import os
import sys
import types
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from blueberry_video.video import process_video
from blueberry_video.video.backends import backend_failure
from blueberry_video.video.resize import (
    ResizeOptions,
    fill,
    resize_video,
    smart_resize,
    smart_resize_volume,
    video_size,
)
from blueberry_video.video.sampling import SamplingOptions, choose, spread

RATES = (1.0, 7.3, 12.5, 24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 50.0, 60.0, 119.88)
TOTALS = (2, 3, 4, 5, 7, 29, 30, 31, 100, 299, 300, 301, 1537, 5400, 107_892)


def torchvision_resize(video, size, interpolation, antialias):
    """Reimplements ``resize`` of torchvision for uint8 tensors."""
    assert interpolation == "bicubic"
    assert antialias
    resized = F.interpolate(video.float(), tuple(size), mode="bicubic", antialias=True)
    return resized.clamp(0, 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def qwen() -> Iterator[types.ModuleType]:
    pytest.importorskip("requests", reason="qwen-vl-utils imports requests")
    if importlib.util.find_spec("qwen_vl_utils") is None:
        pytest.skip("qwen-vl-utils is not installed: pip install --no-deps qwen-vl-utils==0.0.14")
    modules = {name: types.ModuleType(name) for name in ("torchvision", "torchvision.io", "torchvision.transforms")}
    interpolation = types.SimpleNamespace(BICUBIC="bicubic")
    modules["torchvision.transforms"].__dict__.update(
        InterpolationMode=interpolation, functional=types.SimpleNamespace(resize=torchvision_resize)
    )
    modules["torchvision"].__dict__.update(
        io=modules["torchvision.io"], transforms=modules["torchvision.transforms"], __version__="0.29.0"
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        for name in ("qwen_vl_utils", "qwen_vl_utils.vision_process"):
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module("qwen_vl_utils.vision_process")
        for name in ("qwen_vl_utils", "qwen_vl_utils.vision_process"):  # they refer to the stubs
            sys.modules.pop(name)


def from_transformers(file: str, name: str) -> Callable:
    """Function or method of transformers, without importing its module."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        pytest.skip("transformers is not installed")
    path = Path(spec.origin).parent / file
    found = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef) and n.name == name]
    if not found:
        pytest.skip(f"transformers has no {name} in {file}")
    function = found[0]
    function.decorator_list, function.returns = [], None
    for argument in function.args.args:
        argument.annotation = None
    names: dict = {"math": math, "np": np, "torch": torch}
    exec(compile(ast.Module([function], []), str(path), "exec"), names)
    return names[name]


def indices_of(qwen: types.ModuleType, element: dict, total: int, rate: float) -> list[int]:
    """Indices that the readers of qwen-vl-utils take from a file of ``total`` frames."""
    start, end, total = qwen.calculate_video_frame_range(element, total, rate)
    count = qwen.smart_nframes(element, total_frames=total, video_fps=rate)
    return torch.linspace(start, end, count).round().long().tolist()


def test_qwen_indices_at_a_rate(qwen):
    options = [{}, {"fps": 1.0}, {"fps": 0.3}, {"fps": 11.0, "max_frames": 64}, {"min_frames": 9, "max_frames": 17}]
    compared = 0
    for total in TOTALS:
        for rate in RATES:
            times = np.arange(total) / rate
            for element in options:
                expected = indices_of(qwen, element, total, rate)
                assert choose(times, SamplingOptions(**element), rate=rate) == expected, (total, rate, element)
                if rate not in (7.3, 12.5, 119.88):  # with the rate estimated from the timestamps, for any start time
                    assert choose(times + 1234.5, SamplingOptions(**element)) == expected, (total, rate, element)
                compared += 1
    assert compared == 825


@pytest.mark.parametrize("num_frames", [2, 3, 5, 7, 16, 25, 30])
def test_qwen_indices_of_a_count(qwen, num_frames):
    for total in (30, 31, 300, 5403):
        expected = indices_of(qwen, {"nframes": num_frames}, total, 30.0)
        assert choose(np.arange(total) / 30, SamplingOptions(num_frames=num_frames)) == expected


def test_count_above_the_number_of_frames_raises_as_in_qwen(qwen):
    with pytest.raises(ValueError, match="nframes should in interval"):
        indices_of(qwen, {"nframes": 32}, 30, 30.0)
    with pytest.raises(ValueError, match=r"num_frames=32 .*\b30 frames.*pad_frames=true"):
        choose(np.arange(30) / 30, SamplingOptions(num_frames=32))


def test_qwen_ranges(qwen):
    rng = np.random.default_rng(0)
    compared = rejected = 0
    for _ in range(400):
        rate, total = float(rng.choice(RATES)), int(rng.integers(2, 2000))
        start, end = np.sort(rng.uniform(0, 1.1 * total / rate, 2)).tolist()  # never exactly the time of a frame
        times = np.arange(total) / rate + 77
        for element in ({"video_start": start, "video_end": end}, {"video_start": start}, {"video_end": end}):
            options = SamplingOptions(**element)
            try:
                expected = indices_of(qwen, element, total, rate)
            except ValueError:
                rejected += 1
                with contextlib.suppress(
                    ValueError
                ):  # qwen-vl-utils also rejects ranges of one frame, which is repeated here
                    assert len(set(choose(times, options, rate=rate))) == 1
                continue
            assert choose(times, options, rate=rate) == expected, (total, rate, element)
            compared += 1
    assert compared > 1000
    assert rejected > 5


def qwen_size(qwen: types.ModuleType, element: dict, shape: tuple[int, int, int], patch: int) -> tuple[int, int]:
    """Size to which ``fetch_video`` resizes, without computing pixels."""
    frames, height, width = shape
    requested: list = []

    class Reached(Exception):
        pass

    def stop(video, size, interpolation, antialias):
        requested.extend(size)
        raise Reached

    video = torch.zeros(1, dtype=torch.uint8).expand(frames, 3, height, width)  # no memory
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(qwen, "get_video_reader_backend", lambda: "stub")
        patcher.setitem(qwen.VIDEO_READER_BACKENDS, "stub", lambda _: (video, {}, 2.0))
        patcher.setattr(qwen.transforms.functional, "resize", stop)
        with pytest.raises(Reached):
            qwen.fetch_video({"video": "stub", **element}, image_patch_size=patch)
    return requested[0], requested[1]


@pytest.mark.parametrize("patch", [14, 16])
def test_qwen_sizes(qwen, patch):
    factor = 2 * patch
    budgets = [
        {},
        {"min_pixels": 4 * factor**2},
        {"max_pixels": 200 * factor**2},
        {"max_pixels": 2000 * factor**2},
        {"min_pixels": 50_000, "max_pixels": 300_001},
        {"total_pixels": 20_480 * factor**2},
        {"total_pixels": 1_000_003, "min_pixels": 16 * factor**2},
        {"resized_height": 250, "resized_width": 333},
        {"resized_height": 9, "resized_width": 20},
    ]
    sizes = [(720, 1280), (320, 568), (1080, 1920), (2160, 3840), (240, 320), (28, 28), (31, 900), (1001, 7), (1, 1)]
    sizes += [tuple(pair) for pair in np.random.default_rng(patch).integers(8, 2500, (20, 2)).tolist()]
    for height, width in sizes:
        for frames in (2, 20, 360, 768):
            for element in budgets:
                expected = qwen_size(qwen, element, (frames, height, width), patch)
                size = video_size(height, width, frames, ResizeOptions(size_factor=factor, **element))
                # a side that qwen-vl-utils rounds down to 0 is one factor here
                assert size == tuple(max(side, factor) for side in expected), (height, width, frames, element)


def test_extreme_aspect_ratios_raise_as_in_qwen(qwen):
    for height, width in ((10, 2001), (2001, 10)):
        with pytest.raises(ValueError, match="absolute aspect ratio"):
            qwen.smart_resize(height, width, 28)
        with pytest.raises(ValueError, match=r"200\.1\b.*max_aspect=200"):
            smart_resize(height, width, 28, 3136, 602_112)
    assert qwen.smart_resize(10, 2000, 28, 3136, 602_112) == smart_resize(10, 2000, 28, 3136, 602_112)


@pytest.mark.parametrize("shape", [(4, 180, 321), (2, 360, 640), (2, 90, 64)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_qwen_pixels(qwen, shape, channels_last):
    frames, height, width = shape
    video = torch.randint(0, 256, (frames, 3, height, width), generator=torch.Generator().manual_seed(0)).byte()
    if channels_last:
        video = video.contiguous(memory_format=torch.channels_last)
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(qwen, "get_video_reader_backend", lambda: "stub")
        patcher.setitem(qwen.VIDEO_READER_BACKENDS, "stub", lambda _: (video, {}, 2.0))
        expected = qwen.fetch_video({"video": "stub"})
    resized = resize_video(video, ResizeOptions())
    difference = (resized.float() - expected).abs()
    assert resized.shape == expected.shape
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-4


def metadata(total: int, rate: float) -> types.SimpleNamespace:
    return types.SimpleNamespace(total_num_frames=total, fps=rate)


@pytest.mark.parametrize(
    ("file", "defaults", "options"),
    [
        ("models/qwen2_vl/video_processing_qwen2_vl.py", {"temporal_patch_size": 2}, {"spacing": "arange"}),
        ("models/qwen3_vl/video_processing_qwen3_vl.py", {}, {"spacing": "linspace", "frame_factor": 1}),
    ],
)
def test_transformers_indices(file, defaults, options):
    sample_frames = from_transformers(file, "sample_frames")
    processor = types.SimpleNamespace(num_frames=None, fps=2, min_frames=4, max_frames=768, **defaults)
    compared = 0
    for total in (4, 5, 7, 29, 30, 31, 100, 299, 300, 301, 1537, 5400):
        for rate in RATES:
            for requested in ({"fps": 2.0}, {"fps": 0.7}, {"fps": 9.0}, {"num_frames": 4}):
                expected = [int(i) for i in sample_frames(processor, metadata(total, rate), **requested)]
                ours = choose(np.arange(total) / rate, SamplingOptions(**requested, **options), rate=rate)
                # rounding of the steps may add one frame to the count of transformers
                extra = len(expected) - len(ours)
                assert ours == expected[: len(ours)], (total, rate, requested)
                assert extra in ((0, 1) if options["spacing"] == "arange" else (0,))
                compared += extra == 0
    assert compared > 480


def test_transformers_default_and_internvl_indices():
    default = from_transformers("video_utils.py", "default_sample_indices_fn")
    internvl = from_transformers("models/internvl/video_processing_internvl.py", "sample_frames")
    processor = types.SimpleNamespace(num_frames=None, initial_shift=True)
    for total in (1, 2, 9, 31, 300, 5403):
        for count in (1, 2, 8, 9, 31, 32):
            if count <= total:
                options = {"sampling": "uniform", "num_frames": count, "frame_factor": 1}
                times = np.arange(total) / 25
                expected = default(metadata(total, 25.0), num_frames=count).tolist()
                assert choose(times, SamplingOptions(**options, spacing="steps")) == expected
                expected = internvl(processor, metadata(total, 25.0), num_frames=count).tolist()
                assert choose(times, SamplingOptions(**options, spacing="centres")) == expected
    assert spread(10, 13, 2, "centres") == [11, 13]


def test_transformers_sizes():
    volume = from_transformers("models/qwen3_vl/video_processing_qwen3_vl.py", "smart_resize")
    preserving = from_transformers("models/gemma4/image_processing_gemma4.py", "get_aspect_ratio_preserving_size")
    rng = np.random.default_rng(0)
    for height, width, frames in rng.integers((9, 9, 2), (2200, 2200, 600), (300, 3)).tolist():
        expected = volume(frames, height, width, 2, 32, 128 * 32**2, 768 * 32**2 * 100)
        assert smart_resize_volume(height, width, frames, 32, 128 * 32**2, 768 * 32**2 * 100) == expected
        options = ResizeOptions(size_factor=32, pixel_budget="video", max_pixels=768 * 32**2 * 100)
        assert video_size(height, width, frames, options) == expected
        expected = preserving(height, width, 16, 630, 3)
        assert fill(height, width, 48, 630 * 16**2) == expected
    for height, width in ((10, 900), (900, 10), (1, 5000)):
        assert fill(height, width, 48, 630 * 16**2) == preserving(height, width, 16, 630, 3)


@pytest.mark.parametrize("patch_size", [14, 16])
@pytest.mark.parametrize(
    ("element", "overrides"),
    [
        ({}, {}),
        ({"fps": 5.0}, {"fps": 5.0}),
        ({"nframes": 7}, {"num_frames": 7}),
        ({"video_start": 0.31, "video_end": 1.7}, {"video_start": 0.31, "video_end": 1.7}),
        ({"max_pixels": 140_000}, {"max_pixels": 140_000}),
        ({"min_pixels": 300_000}, {"min_pixels": 300_000}),
        ({"total_pixels": 900_000}, {"total_pixels": 900_000}),
        ({"resized_height": 200, "resized_width": 330}, {"resized_height": 200, "resized_width": 330}),
    ],
)
def test_videos_equal_fetch_video(qwen, tmp_path, monkeypatch, patch_size, element, overrides):
    if backend_failure("torchcodec"):
        pytest.skip("torchcodec, the reader of qwen-vl-utils, does not work here")
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", "torchcodec")
    path = tmp_path / "clip.mp4"
    rng = np.random.default_rng(0)
    canvas = rng.integers(0, 255, (9, 30, 3), dtype=np.uint8).repeat(20, axis=0).repeat(20, axis=1)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 322, 180, "yuv420p"
        for i in range(53):
            frame = np.ascontiguousarray(canvas[:, 4 * i : 4 * i + 322])
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
    expected, known = qwen.fetch_video({"video": str(path), **element}, patch_size, return_video_metadata=True)
    video = process_video(path, {14: "qwen2.5-vl", 16: "qwen3-vl"}[patch_size], **overrides)
    assert list(video.metadata.frame_indices) == known["frames_indices"]
    assert video.pixels.shape == expected.shape
    assert float((video.pixels.float() - expected).abs().max()) <= 1


# (file name, rate, frames, width, height): containers, codecs, rates, lengths and shapes
MADE = [
    *((f"rate{i}.mp4", rate, 61, 96, 64) for i, rate in enumerate((7, 10, 12.5, 15, 24, 25, 30, 50, 60, 119.88))),
    ("film.mp4", Fraction(24000, 1001), 100, 96, 64),
    ("ntsc.mp4", Fraction(30000, 1001), 121, 96, 64),
    ("ntsc60.mkv", Fraction(60000, 1001), 150, 96, 64),
    *((f"short{n}.mp4", 30, n, 96, 64) for n in (2, 3, 4, 5, 7, 29)),
    *((f"{n}s.mp4", 10, 10 * n, 64, 48) for n in (1, 2, 3, 10, 61)),
    ("matroska.mkv", 30, 77, 96, 64),
    ("old.avi", 25, 60, 96, 64),
    ("quick.mov", 24, 49, 96, 64),
    ("web.webm", 25, 30, 96, 64),
    ("odd.mkv", 30, 40, 321, 241),
    ("portrait.mp4", 30, 45, 180, 320),
    ("wide.mp4", 30, 45, 640, 90),
    ("large.mp4", 30, 20, 1280, 720),
    ("tiny.mp4", 30, 40, 32, 32),
]
REAL = (
    sorted(Path(os.environ["BLUEBERRY_TEST_VIDEOS"]).glob("*.[ma][pkv]*"))
    if "BLUEBERRY_TEST_VIDEOS" in os.environ
    else []
)
LISTS = [(1, None), (2, None), (3, None), (4, 1.0), (5, None), (5, 4.0), (7, 0.5), (9, 24.0), (12, 10.0)]


def write_gray(path: Path, rate: float | Fraction, num_frames: int, width: int, height: int) -> Path:
    codec = {".avi": "mpeg4", ".webm": "libvpx"}.get(path.suffix, "libx264")
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=Fraction(rate).limit_denominator(1001))
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if width % 2 else "yuv420p"
        picture = np.zeros((height, width, 3), np.uint8)
        for i in range(num_frames):
            picture[...] = 40 + i % 100
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    return path


def qwen_and_transformers(qwen: types.ModuleType, element: dict, patch: int) -> dict:
    """Frames, size, tokens and times that Qwen2.5-VL and Qwen3-VL receive from both libraries."""
    sampled_fps = from_transformers("video_utils.py", "sampled_fps")
    calculate = from_transformers("models/qwen3_vl/processing_qwen3_vl.py", "_calculate_timestamps")
    with pytest.MonkeyPatch.context() as patcher:  # the pixels are compared in test_videos_equal_fetch_video
        blank = torch.zeros(1)
        patcher.setattr(
            qwen.transforms.functional, "resize", lambda video, size, **_: blank.expand(len(video), 3, *size)
        )
        video, known = qwen.fetch_video({**element}, patch, return_video_metadata=True)
    frames, _, height, width = video.shape
    indices = [int(i) for i in known["frames_indices"]]
    fps = sampled_fps(types.SimpleNamespace(**{**known, "frames_indices": indices}))
    return {
        "indices": indices,
        "size": (height, width),
        "tokens": frames // 2 * (height // patch // 2) * (width // patch // 2),
        "grid": [frames // 2, height // patch, width // patch],
        "second_per_grid_ts": 2 / fps,
        "timestamps": calculate(None, list(indices), known["fps"], 2),
    }


def ours(source: object, patch: int, overrides: dict) -> dict:
    model = {14: "qwen2.5-vl", 16: "qwen3-vl"}[patch]
    video = process_video(source, model, format="huggingface", resample="fast", measure_quality=False, **overrides)
    known, frames = video.metadata, video.frames
    found = {
        "indices": list(known.frame_indices),
        "size": known.resolution,
        "tokens": math.prod(known.grid_thw) // 4,
        "grid": frames["video_grid_thw"][0].tolist(),
    }
    times = "second_per_grid_ts" if patch == 14 else "timestamps"
    return found | {times: frames[times][0].item() if patch == 14 else frames[times].tolist()}


def check_equal(found: dict, expected: dict, case: object) -> None:
    """Compares exactly, except times: a millisecond is the resolution of Matroska's timestamps, which ours are."""
    tolerances = {"second_per_grid_ts": {"rel": 5e-4}, "timestamps": {"abs": 1e-3}}
    for key, value in found.items():
        exact = key not in tolerances
        assert value == (expected[key] if exact else pytest.approx(expected[key], **tolerances[key])), (case, key)


@pytest.mark.parametrize("patch", [14, 16])
def test_files_have_the_input_of_qwen_and_transformers(qwen, tmp_path, monkeypatch, patch):
    if backend_failure("torchcodec"):
        pytest.skip("torchcodec, the reader of qwen-vl-utils, does not work here")
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", "torchcodec")
    monkeypatch.setenv("TORCHCODEC_NUM_THREADS", "1")
    paths = [write_gray(tmp_path / name, *properties) for name, *properties in MADE] + REAL
    assert len(paths) == len(MADE) + len(REAL) >= 33
    for path in paths:
        expected = qwen_and_transformers(qwen, {"video": str(path)}, patch)
        check_equal(ours(path, patch, {}), expected, path.name)


def milliseconds(name: str) -> list[int]:
    """Milliseconds from each frame to the next, the last to the end, of a video of varying rate."""
    rng = np.random.default_rng(len(name))
    return {
        "phone": lambda: [*rng.choice([33, 34], 90).tolist(), 33],
        "dropped": lambda: [*rng.choice([33, 33, 33, 66, 100], 80).tolist(), 33],
        "switch": lambda: [33] * 60 + [200] * 21,
        "slides": lambda: [5000, 2000, 5000, 1000, 3000, 8000],
        "screen": lambda: [*rng.integers(16, 900, 70).tolist(), 2500],
        "held_end": lambda: [100] * 30 + [5000],
        "held_start": lambda: [6000] + [40] * 51,
        "gap": lambda: [40] * 25 + [7000] + [40] * 26,
        "random": lambda: [*rng.integers(5, 400, 120).tolist(), 100],
        "long": lambda: [*rng.integers(200, 3000, 60).tolist(), 1000],
    }[name]()


PATTERNS = ("phone", "dropped", "switch", "slides", "screen", "held_end", "held_start", "gap", "random", "long")


def write_varying(path: Path, shown: list[int], codec: str) -> Path:
    starts = dict(zip(np.cumsum([0, *shown[:-1]]).tolist(), shown))
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        packets = []
        for i, start in enumerate(starts):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 + i % 100, np.uint8), format="rgb24")
            frame.pts, frame.time_base = start, Fraction(1, 1000)
            packets += stream.encode(frame)
        for packet in [*packets, *stream.encode()]:
            packet.duration = starts[round(1000 * packet.pts * packet.time_base)]
            output.mux(packet)
    return path


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".mkv", "libx264"), (".webm", "libvpx"), (".mp4", "mpeg4"), (".mp4", "libx264")]
)
def test_files_of_varying_rate_have_the_input_of_qwen_and_transformers(qwen, tmp_path, monkeypatch, suffix, codec):
    """Equal except the times of Qwen3-VL, which are those of the frames, not indices over the average rate."""
    if backend_failure("torchcodec"):
        pytest.skip("torchcodec, the reader of qwen-vl-utils, does not work here")
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", "torchcodec")
    monkeypatch.setenv("TORCHCODEC_NUM_THREADS", "1")
    compared = 0
    for name in PATTERNS:
        shown = milliseconds(name)
        path = write_varying(tmp_path / f"{name}{suffix}", shown, codec)
        starts, duration = np.cumsum([0, *shown[:-1]]) / 1000, sum(shown) / 1000
        for patch in (14, 16):
            expected, found = qwen_and_transformers(qwen, {"video": str(path)}, patch), ours(path, patch, {})
            read = expected["second_per_grid_ts"] * len(expected["indices"]) / 2  # seconds of the video, as read there
            if abs(read - duration) > 2e-3:  # B-frames in mp4: packets have no display times, and FFmpeg below 6 none
                assert (suffix, codec) == (".mp4", "libx264")
                options = SamplingOptions()
                assert choose(starts, options, duration=read) == expected["indices"], (name, patch)
                continue
            times = found.pop("timestamps", None)
            check_equal(found, expected, (name, patch))
            compared += 1
            if times is not None:
                pairs = starts[found["indices"]].reshape(-1, 2).mean(axis=1)  # of a temporal patch
                assert times == pytest.approx(pairs.tolist(), abs=1e-3)
    assert compared == 20 or (suffix, codec) == (".mp4", "libx264")


@pytest.mark.parametrize("patch", [14, 16])
def test_lists_have_the_input_of_qwen_and_transformers(qwen, patch):
    for size in ((64, 48), (320, 180), (100, 150), (1100, 60)):
        for count, fps in LISTS:
            pictures = [Image.new("RGB", size, (i, i, i)) for i in range(count)]
            element = {"video": pictures} | ({} if fps is None else {"sample_fps": fps})
            expected = qwen_and_transformers(qwen, element, patch)
            padding = expected["indices"].copy()
            expected["indices"] = [
                min(i, count - 1) for i in padding
            ]  # ours repeat the last index, not only its pixels
            overrides = {} if fps is None else {"frames_fps": fps}
            check_equal(ours(pictures, patch, overrides), expected, (size, count, fps))


def test_two_seconds_are_one_second_per_grid(qwen, tmp_path):
    path = write_gray(tmp_path / "clip.mp4", 30, 60, 96, 64)
    assert ours(path, 14, {})["second_per_grid_ts"] == 1.0
