"""Tests of frame sizes and of resized pixels."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from blueberry_video.video import resize as resize_module
from blueberry_video.video.resize import (
    ResizeOptions,
    crop,
    fill,
    resize,
    resize_video,
    smart_resize,
    smart_resize_volume,
    video_size,
)

SIDES = st.integers(1, 4000)


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).byte()


def reference(frames: torch.Tensor, size: tuple[int, int], mode: str = "bicubic") -> torch.Tensor:
    """Float interpolation, clamped and rounded."""
    return F.interpolate(frames.float(), size, mode=mode, antialias=True).clamp(0, 255).round().to(torch.uint8)


@pytest.mark.parametrize(
    ("frames", "height", "width", "factor", "size", "tokens"),
    [
        (20, 720, 1280, 28, (560, 1008), 7200),
        (20, 720, 1280, 32, (640, 1152), 7200),
        (20, 320, 568, 28, (308, 560), 2200),
        (20, 320, 568, 32, (320, 576), 1800),
        (768, 1080, 1920, 28, (336, 644), 105_984),
        (768, 1080, 1920, 32, (384, 736), 105_984),
        (360, 1080, 1920, 28, (504, 924), 106_920),
        (360, 1080, 1920, 32, (576, 1056), 106_920),
        (4, 240, 320, 28, (280, 392), 280),
        (4, 240, 320, 32, (320, 448), 280),
    ],
)
def test_sizes_equal_reference_values(frames, height, width, factor, size, tokens):
    assert video_size(height, width, frames, ResizeOptions(size_factor=factor)) == size
    assert frames // 2 * (size[0] // factor) * (size[1] // factor) == tokens


def test_sides_are_never_zero():
    assert smart_resize(28, 5600, 28, 4 * 784, 100_000) == (28, 4452)
    assert smart_resize(5600, 28, 28, 4 * 784, 100_000) == (4452, 28)


@given(SIDES, SIDES, st.sampled_from([14, 28, 32]), st.integers(1, 900), st.integers(1, 900))
@settings(max_examples=150, deadline=None)
def test_smart_sizes_are_aligned_and_within_the_budgets(height, width, factor, low, more):
    least, most = low * factor**2, (low + more) * factor**2
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(ValueError, match="max_aspect=200"):
            smart_resize(height, width, factor, least, most)
        return
    size = smart_resize(height, width, factor, least, most)
    assert all(side % factor == 0 and side >= factor for side in size)
    pixels, larger, smaller = (math.prod(side + more for side in size) for more in (0, factor, -factor))
    assert pixels >= least or larger > least  # up to one factor per side is lost if the budgets are that close
    assert pixels <= most or min(size) == factor or smaller < least
    assert smart_resize(height, width, factor, least, most) == size
    assert smart_resize(width, height, factor, least, most) == size[::-1]


@given(SIDES, SIDES, st.integers(2, 768), st.sampled_from([28, 32]))
@settings(max_examples=150, deadline=None)
def test_video_stays_within_total_pixels(height, width, frames, factor):
    options = ResizeOptions(size_factor=factor, max_aspect=math.inf)
    size = video_size(height, width, frames, options)
    share = max(0.9 * 128_000 * factor**2 / frames * 2, 1.05 * 128 * factor**2)
    slim = min(size) == factor
    assert size[0] * size[1] <= min(768 * factor**2, share) or slim
    assert min(height, width) < factor or slim or abs(math.log(size[0] / size[1] * width / height)) < 0.7


def test_budgets_have_the_precedence_of_qwen_vl_utils():
    for total in (1, 10_000_000):  # at least 1.05 times min_pixels, which is 252 x 336
        assert video_size(780, 1000, 768, ResizeOptions(total_pixels=total)) == (280, 364)
    assert video_size(2160, 3840, 4, ResizeOptions(max_pixels=10**8)) == video_size(2160, 3840, 4, ResizeOptions())
    assert video_size(720, 1280, 4, ResizeOptions(max_pixels=200_000)) == (308, 588)


def test_video_budget_depends_on_the_number_of_frames():
    options = ResizeOptions(size_factor=32, pixel_budget="video", max_pixels=768 * 1024 * 20)
    assert video_size(720, 1280, 20, options) == (640, 1152)
    assert video_size(720, 1280, 80, options) == (320, 576)
    assert video_size(720, 1280, 2, options) == (704, 1280)  # only rounded, within the budgets
    assert smart_resize_volume(10, 40, 4, 32, 1, 10**9) == (32, 128)  # first enlarged to one factor


def test_rules_other_than_smart():
    gpt = ResizeOptions(rule="fit", max_long_side=2048, max_short_side=768)
    assert video_size(1080, 1920, 1, gpt) == (768, 1365)
    assert video_size(4000, 1000, 1, gpt) == (2048, 512)
    assert video_size(300, 200, 1, gpt) == (300, 200)
    assert video_size(1080, 1920, 1, ResizeOptions(rule="crop", image_size=336)) == (336, 336)
    cover = ResizeOptions(rule="cover", image_size=(336, 300), resample="fast")
    assert video_size(1080, 1920, 1, cover) == (336, 597)
    assert resize_video(noise(1, 3, 54, 96), cover).shape == (1, 3, 336, 597)
    assert video_size(1080, 1920, 1, ResizeOptions(rule="stretch", image_size=(240, 320))) == (240, 320)
    assert video_size(1081, 1920, 9, ResizeOptions(rule="none")) == (1081, 1920)
    gemma = ResizeOptions(rule="fill", size_factor=48, max_pixels=630 * 256)
    assert video_size(1080, 1920, 1, gemma) == (288, 528)
    assert video_size(27, 48, 1, gemma) == (288, 528)
    assert fill(1, 5000, 48, 630 * 256) == (48, 70 * 48)  # limited by the budget
    explicit = ResizeOptions(resized_height=250, resized_width=333)
    assert video_size(1080, 1920, 768, explicit) == (252, 336)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    "sides", [(1280, 1008), (1920, 644), (568, 560), (90, 91), (40, 333), (7, 3), (1, 5), (5, 1), (999, 2)]
)
def test_weights_equal_those_of_pytorch(mode, sides):
    inputs, outputs = sides
    dense = torch.zeros(outputs, inputs)
    for block in resize_module._blocks(inputs, outputs, mode, 16):
        dense[block.start : block.stop, block.first : block.last] = block.weights
    expected = F.interpolate(torch.eye(inputs)[None, None], (inputs, outputs), mode=mode, antialias=True)[0, 0].T
    torch.testing.assert_close(dense, expected, rtol=0, atol=1e-6)  # PyTorch uses fused multiplications
    assert dense.sum(dim=1).sub(1).abs().max() < 1e-6


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((180, 320), (140, 252)),
        ((270, 480), (84, 168)),
        ((60, 90), (196, 280)),
        ((33, 57), (112, 28)),
        ((9, 9), (1, 1)),
    ],
)
def test_exact_pixels_equal_float_interpolation(mode, channels_last, old, new):
    frames = noise(3, 3, *old)
    if channels_last:
        frames = frames.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    difference = (resize(frames, new, interpolation=mode).int() - reference(frames, new, mode).int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3 if mode == "bilinear" else (difference > 0).float().mean() < 1e-4


def test_buffer_size_does_not_change_pixels(monkeypatch):
    frames = noise(2, 3, 300, 200)
    whole = resize(frames, (196, 112))
    monkeypatch.setattr(resize_module, "BUFFER_BYTES", 1)  # one block of rows at a time
    difference = (resize(frames, (196, 112)).int() - whole.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-4


def test_frames_are_resized_independently():
    frames = noise(4, 3, 100, 120)
    one_by_one = torch.cat([resize(frame[None], (56, 84)) for frame in frames])
    assert torch.equal(resize(frames, (56, 84)), one_by_one)


@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 70), st.integers(1, 50), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_resizing_preserves_dtype_and_constants(height, width, new_height, new_width, exact, cubic):
    arguments = ((new_height, new_width), "exact" if exact else "fast", "bicubic" if cubic else "bilinear")
    flat = torch.tensor([0, 137, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, height, width)
    for frames in (flat, flat.contiguous()):
        resized = resize(frames, *arguments)
        assert resized.dtype == torch.uint8
        assert resized.shape == (2, 3, new_height, new_width)
        assert torch.equal(resized, flat[:, :, :1, :1].expand_as(resized))
    cropped = crop(flat, *arguments)
    assert torch.equal(cropped, flat[:, :, :1, :1].expand_as(cropped))


def test_overshoot_is_clamped():
    edge = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    edge[..., 4:] = 255
    row = resize(edge, (8, 32))[0, 0, 0].int()
    assert row[:12].max() < 40  # an undershoot below 0 would wrap around to 250
    assert row[20:].min() > 215
    assert bool((row[12:20].diff() >= 0).all())


def test_fast_pixels_are_close_and_equal_sizes_return_the_input():
    frames = noise(2, 3, 90, 160)
    smooth = resize(resize(frames, (9, 16)), (90, 160))
    difference = (resize(smooth, (56, 84), "fast").int() - resize(smooth, (56, 84)).int()).abs()
    assert difference.max() <= 3
    assert resize(frames, (90, 160)) is frames
    assert resize_video(frames, ResizeOptions(rule="none")) is frames


def plain_bilinear(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Rule without antialias: output i lies at (i + 0.5) * scale - 0.5, between its two nearest inputs, in float64."""
    pixels = frames.double()
    for axis, length in ((2, size[0]), (3, size[1])):
        inputs = pixels.shape[axis]
        at = ((torch.arange(length).double() + 0.5) * inputs / length - 0.5).clamp(0, inputs - 1)
        low = at.floor().long()
        shape = [1, 1, 1, 1]
        shape[axis] = length
        share = (at - low).view(shape)
        high = (low + 1).clamp(max=inputs - 1)
        pixels = pixels.index_select(axis, low) * (1 - share) + pixels.index_select(axis, high) * share
    return pixels


@pytest.mark.parametrize(("resample", "tolerance"), [("exact", 0.501), ("fast", 1.5)])
@pytest.mark.parametrize("size", [(28, 28), (21, 40), (90, 130), (1, 3), (5, 1)])
def test_without_antialias_pixels_mix_their_nearest_four(size, resample, tolerance):
    frames = noise(2, 3, 60, 100)
    for layout in (frames, frames.to(memory_format=torch.channels_last)):
        got = resize(layout, size, resample, "bilinear", antialias=False)
        assert got.dtype == torch.uint8
        assert (got.double() - plain_bilinear(frames, size)).abs().max() <= tolerance
    covering = resize(frames, (28, 47), resample, "bilinear", antialias=False)
    assert torch.equal(crop(frames, (28, 28), resample, "bilinear", antialias=False), covering[..., 9:37])
    options = ResizeOptions("crop", image_size=28, resample=resample, interpolation="bilinear", antialias=False)
    assert torch.equal(resize_video(frames, options), covering[..., 9:37])


def test_without_antialias_large_frames_are_resized_in_parts(monkeypatch):
    frames = noise(7, 3, 60, 100)
    whole = resize(frames, (28, 28), "exact", "bicubic", antialias=False)
    monkeypatch.setattr(resize_module, "BUFFER_BYTES", 18000)  # two frames a part
    assert torch.equal(resize(frames, (28, 28), "exact", "bicubic", antialias=False), whole)


def test_crop_and_stretch_with_the_fast_bilinear_kernel():
    frames = noise(2, 3, 60, 100)
    stretched = resize(frames, (28, 28), "fast", "bilinear")
    assert torch.equal(stretched, F.interpolate(frames, (28, 28), mode="bilinear", antialias=True))
    covering = F.interpolate(frames, (28, 47), mode="bilinear", antialias=True)
    assert torch.equal(crop(frames, (28, 28), "fast", "bilinear"), covering[..., 9:37])
    tall = F.interpolate(frames.mT, (47, 28), mode="bilinear", antialias=True)
    assert torch.equal(crop(frames.mT, (28, 28), "fast", "bilinear"), tall[:, :, 9:37])
    options = ResizeOptions(rule="crop", image_size=[28, 28], resample="fast", interpolation="bilinear")
    assert torch.equal(resize_video(frames, options), covering[..., 9:37])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a CUDA device")
@pytest.mark.parametrize("resample", ["exact", "fast"])
def test_gpu_equals_cpu(resample):
    frames = noise(3, 3, 180, 320)
    on_gpu = resize(frames.cuda(), (140, 252), resample)
    difference = (on_gpu.cpu().int() - reference(frames, (140, 252)).int()).abs()
    assert on_gpu.is_cuda
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rule": "smaart"}, r"rule='smaart' .*smart, fill"),
        ({"resample": "quick"}, r"resample='quick' .*exact, fast"),
        ({"interpolation": "cubic"}, r"interpolation='cubic' .*bicubic, bilinear"),
        ({"pixel_budget": "clip"}, r"pixel_budget='clip' .*frame, video"),
        ({"antialias": 2}, r"antialias=2 .*true or false"),
        ({"size_factor": 0}, r"size_factor=0 .*at least 1"),
        ({"max_pixels": -3}, r"max_pixels=-3 .*at least 1"),
        ({"resized_height": 280}, r"resized_height=280 and resized_width=None"),
        ({"rule": "crop"}, r"rule='crop' .*image_size"),
        ({"rule": "fill"}, r"rule='fill' .*max_pixels"),
        ({"rule": "crop", "image_size": (1, 2, 3)}, r"image_size=\(1, 2, 3\)"),
    ],
)
def test_invalid_options_raise(wrong, message):
    with pytest.raises(ValueError, match=message):
        ResizeOptions(**wrong)


def test_invalid_videos_raise():
    with pytest.raises(ValueError, match=r"min_pixels=602113 .*max_pixels=602112"):
        video_size(720, 1280, 4, ResizeOptions(min_pixels=602_113, max_pixels=602_112))
    with pytest.raises(ValueError, match=r"\b250\b.*max_aspect=200"):
        video_size(4, 1000, 4, ResizeOptions())
    with pytest.raises(ValueError, match=r"num_frames=0 .*30x20"):
        video_size(20, 30, 0, ResizeOptions())
    with pytest.raises(ValueError, match=r"max_pixels=100 .*size_factor=48"):
        fill(20, 30, 48, 100)
    for frames in (noise(2, 3, 4, 4).float(), noise(3, 4, 4), noise(2, 3, 4, 4)[:0]):
        with pytest.raises(ValueError, match=r"frames are .*uint8 \(T, 3, H, W\)"):
            resize(frames, (2, 2))
        with pytest.raises(ValueError, match=r"frames are .*uint8 \(T, 3, H, W\)"):
            resize_video(frames, ResizeOptions())
    with pytest.raises(ValueError, match=r"image_size=\(0, 4\)"):
        resize(noise(1, 3, 4, 4), (0, 4))
