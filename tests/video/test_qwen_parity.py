"""Frame indices, sizes and pixels against the functions of qwen-vl-utils and of transformers themselves.

Both import torchvision, which need not be here. For qwen-vl-utils modules stand in for it; of transformers the wanted
functions, which are pure, are taken out of their source files.
"""

import ast
import contextlib
import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

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
    """What torchvision's ``resize`` makes of a uint8 tensor."""
    assert interpolation == "bicubic"
    assert antialias
    resized = F.interpolate(video.float(), tuple(size), mode="bicubic", antialias=True)
    return resized.clamp(0, 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def qwen() -> Iterator[types.ModuleType]:
    pytest.importorskip("requests", reason="qwen-vl-utils imports requests")
    if importlib.util.find_spec("qwen_vl_utils") is None:
        pytest.skip("qwen-vl-utils is not here: pip install --no-deps qwen-vl-utils==0.0.14")
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
        for name in ("qwen_vl_utils", "qwen_vl_utils.vision_process"):  # they hold the stand-ins
            sys.modules.pop(name)


def from_transformers(file: str, name: str) -> Callable:
    """A function or method of transformers, without importing the file that it is in."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        pytest.skip("transformers is not here")
    path = Path(spec.origin).parent / file
    found = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef) and n.name == name]
    if not found:
        pytest.skip(f"this transformers has no {name} in {file}")
    function = found[0]
    function.decorator_list, function.returns = [], None
    for argument in function.args.args:
        argument.annotation = None
    names: dict = {"math": math, "np": np, "torch": torch}
    exec(compile(ast.Module([function], []), str(path), "exec"), names)
    return names[name]


def indices_of(qwen: types.ModuleType, element: dict, total: int, rate: float) -> list[int]:
    """What its readers do with a file of so many frames."""
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
                if rate not in (7.3, 12.5, 119.88):  # the rate itself found from the times, wherever they start
                    assert choose(times + 1234.5, SamplingOptions(**element)) == expected, (total, rate, element)
                compared += 1
    assert compared == 825


@pytest.mark.parametrize("num_frames", [2, 3, 5, 7, 16, 25, 30])
def test_qwen_indices_of_a_count(qwen, num_frames):
    for total in (30, 31, 300, 5403):
        expected = indices_of(qwen, {"nframes": num_frames}, total, 30.0)
        assert choose(np.arange(total) / 30, SamplingOptions(num_frames=num_frames)) == expected


def test_qwen_refuses_a_count_above_the_frames_and_so_do_we(qwen):
    with pytest.raises(ValueError, match="nframes should in interval"):
        indices_of(qwen, {"nframes": 32}, 30, 30.0)
    with pytest.raises(ValueError, match=r"num_frames=32 .*30 frames .*pad_frames=true"):
        choose(np.arange(30) / 30, SamplingOptions(num_frames=32))


def test_qwen_ranges(qwen):
    rng = np.random.default_rng(0)
    compared = refused = 0
    for _ in range(400):
        rate, total = float(rng.choice(RATES)), int(rng.integers(2, 2000))
        start, end = np.sort(rng.uniform(0, 1.1 * total / rate, 2)).tolist()  # never the very time of a frame
        times = np.arange(total) / rate + 77
        for element in ({"video_start": start, "video_end": end}, {"video_start": start}, {"video_end": end}):
            options = SamplingOptions(**element)
            try:
                expected = indices_of(qwen, element, total, rate)
            except ValueError:
                refused += 1
                with contextlib.suppress(ValueError):  # it refuses ranges of one frame too, which here is repeated
                    assert len(set(choose(times, options, rate=rate))) == 1
                continue
            assert choose(times, options, rate=rate) == expected, (total, rate, element)
            compared += 1
    assert compared > 1000
    assert refused > 5


def qwen_size(qwen: types.ModuleType, element: dict, shape: tuple[int, int, int], patch: int) -> tuple[int, int]:
    """The size that ``fetch_video`` resizes to, without pixels."""
    frames, height, width = shape
    asked: list = []

    class Reached(Exception):
        pass

    def stop(video, size, interpolation, antialias):
        asked.extend(size)
        raise Reached

    video = torch.zeros(1, dtype=torch.uint8).expand(frames, 3, height, width)  # no memory
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(qwen, "get_video_reader_backend", lambda: "made")
        patcher.setitem(qwen.VIDEO_READER_BACKENDS, "made", lambda _: (video, {}, 2.0))
        patcher.setattr(qwen.transforms.functional, "resize", stop)
        with pytest.raises(Reached):
            qwen.fetch_video({"video": "made", **element}, image_patch_size=patch)
    return asked[0], asked[1]


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
                # where its floor gives a side of 0, ours is one factor
                assert size == tuple(max(side, factor) for side in expected), (height, width, frames, element)


def test_qwen_refuses_what_we_refuse(qwen):
    for height, width in ((10, 2001), (2001, 10)):
        with pytest.raises(ValueError, match="absolute aspect ratio"):
            qwen.smart_resize(height, width, 28)
        with pytest.raises(ValueError, match=r"2001.*200\.1, above max_aspect=200"):
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
        patcher.setattr(qwen, "get_video_reader_backend", lambda: "made")
        patcher.setitem(qwen.VIDEO_READER_BACKENDS, "made", lambda _: (video, {}, 2.0))
        expected = qwen.fetch_video({"video": "made"})
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
            for asked in ({"fps": 2.0}, {"fps": 0.7}, {"fps": 9.0}, {"num_frames": 4}):
                expected = [int(i) for i in sample_frames(processor, metadata(total, rate), **asked)]
                ours = choose(np.arange(total) / rate, SamplingOptions(**asked, **options), rate=rate)
                # where its steps do not add up it gives one frame more than its own count
                extra = len(expected) - len(ours)
                assert ours == expected[: len(ours)], (total, rate, asked)
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
def test_whole_videos_are_those_of_fetch_video(qwen, tmp_path, monkeypatch, patch_size, element, overrides):
    if backend_failure("torchcodec"):
        pytest.skip("torchcodec does not work here, which qwen-vl-utils reads with")
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
