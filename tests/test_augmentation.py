"""Augmentations, mostly on videos that hold the coordinates of each pixel."""

import math
import re

import pytest
import torch

from blueberry_video.augmentation import (
    OFFSETS,
    HorizontalFlip,
    MultiScaleCrop,
    RandomErasing,
    RandomResizedCrop,
    random_boxes,
)


def coordinates(height: int, width: int, frames: int = 3) -> torch.Tensor:
    """Video (1, 2, T, H, W) that holds the row and column of each pixel, in [0, 1]."""
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    return torch.stack([y, x])[None, :, None].expand(1, 2, frames, height, width)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 48), (48, 24)])
def test_size_of_the_result(height, width):
    out = MultiScaleCrop(16)(torch.rand(2, 3, 4, height, width))
    assert out.shape == (2, 3, 4, 16, 16)
    assert out.min() >= 0
    assert out.max() <= 1


def test_crops_are_the_same_in_every_frame_and_differ_between_clips():
    torch.manual_seed(0)
    video = coordinates(40, 40).expand(4, 2, 3, 40, 40)
    out = MultiScaleCrop(20, flip=0.5)(video)
    for frame in range(1, 3):
        assert torch.equal(out[:, :, frame], out[:, :, 0])
    assert len(torch.unique(out[:, :, 0].flatten(1), dim=0)) == 4


def test_full_crop_of_the_same_size_is_the_identity():
    video = torch.rand(2, 3, 4, 16, 16)
    torch.testing.assert_close(MultiScaleCrop(16, scales=(1.0,))(video), video)


def test_crops_have_the_given_scales_at_most_one_step_apart():
    """The span of row and column coordinates in the result is the height and width of the crop."""
    torch.manual_seed(0)
    size, seen = 100, set()
    crop = MultiScaleCrop(50, scales=(1.0, 0.8, 0.5))
    for _ in range(150):
        out = crop(coordinates(size, size, frames=1))[0, :, 0]
        step_y, step_x = (out[0, 30, 25] - out[0, 20, 25]) / 10, (out[1, 25, 30] - out[1, 25, 20]) / 10
        seen.add((round(step_y.item() * 50, 2), round(step_x.item() * 50, 2)))
    assert seen == {(1.0, 1.0), (1.0, 0.8), (0.8, 1.0), (0.8, 0.8), (0.8, 0.5), (0.5, 0.8), (0.5, 0.5)}


def test_flip_mirrors_columns_only():
    video = torch.rand(2, 3, 2, 8, 8)
    torch.testing.assert_close(MultiScaleCrop(8, scales=(1.0,), flip=1.0)(video), video.flip(-1))


def test_crops_are_at_the_thirteen_positions():
    torch.manual_seed(0)
    crop = MultiScaleCrop(12, scales=(0.6,))  # 12 of 20 pixels: a quarter of the margin is 2
    outs = torch.cat([crop(coordinates(20, 20, frames=1)) for _ in range(400)])
    corners = {(round(y.item() * 20), round(x.item() * 20)) for y, x in outs[:, :2, 0, 0, 0]}
    assert corners == {(2 * down, 2 * across) for down, across in OFFSETS}
    assert len(corners) == 13


def test_crop_size_close_to_the_output_size_is_not_resized():
    video = torch.rand(1, 3, 2, 20, 20)
    crop = MultiScaleCrop(16, scales=(0.9,))  # 18 pixels are rounded to 16, so that the crop is not resized
    cut = crop(video)
    assert any(torch.equal(cut, video[..., top : top + 16, left : left + 16]) for top in range(5) for left in range(5))


def test_crops_are_seeded():
    video, crop = torch.rand(2, 3, 4, 32, 32), MultiScaleCrop(16, flip=0.5)
    torch.manual_seed(5)
    first = crop(video)
    torch.manual_seed(5)
    assert torch.equal(crop(video), first)


@pytest.mark.parametrize("scales", [(), (0.0,), (1.0, 1.2), (-0.5,)])
def test_invalid_scales_raise(scales):
    with pytest.raises(ValueError, match=rf"augment\.scales={re.escape(str(scales))}"):
        MultiScaleCrop(16, scales=scales)


@pytest.mark.parametrize("flip", [-0.1, 1.1])
def test_invalid_flip_raises(flip):
    with pytest.raises(ValueError, match=rf"augment\.flip={flip}\b.*\[0, 1\]"):
        MultiScaleCrop(16, flip=flip)


ALL = [RandomResizedCrop(16), HorizontalFlip(0.5), RandomErasing(0.7), RandomErasing(0.7, mode="constant")]


@pytest.mark.parametrize("augment", ALL, ids=lambda augment: type(augment).__name__)
def test_every_augmentation_is_seeded_and_not_in_place(augment):
    video = torch.rand(6, 3, 4, 16, 16)
    before = video.clone()
    torch.manual_seed(5)
    first = augment(video)
    assert first.shape == (6, 3, 4, 16, 16)
    assert torch.equal(video, before)
    torch.manual_seed(5)
    assert torch.equal(augment(video), first)
    assert not torch.equal(augment(video), first)


@pytest.mark.parametrize("frames", [1, 3])
def test_augmentations_compose_and_accept_single_frames(frames):
    augment = torch.nn.Sequential(RandomResizedCrop(8), HorizontalFlip(), RandomErasing(1.0))
    assert augment(torch.rand(2, 3, frames, 20, 28)).shape == (2, 3, frames, 8, 8)


def sides(out: torch.Tensor, size: int) -> tuple[float, float]:
    """Relative height and width of the crop of ``coordinates`` that was resized to ``out`` (2, size, size)."""
    low, high = size // 4, size - size // 4
    span = (high - low) / size
    return ((out[0, high, low] - out[0, low, low]) / span).item(), (
        (out[1, low, high] - out[1, low, low]) / span
    ).item()


def test_resized_crops_have_the_published_areas_and_ratios():
    torch.manual_seed(0)
    height, width = 80, 120
    outs = RandomResizedCrop(40)(coordinates(height, width, frames=1).expand(300, -1, -1, -1, -1))[:, :, 0]
    areas, ratios = [], []
    for out in outs:
        h, w = sides(out, 40)
        areas.append(h * w)
        ratios.append(w * width / (h * height))
    assert 0.07 < min(areas) < 0.15
    assert 0.8 < max(areas) <= 1.01
    assert 0.70 < min(ratios) < 0.80
    assert 1.25 < max(ratios) < 1.42
    assert sum(map(math.log, ratios)) / 300 == pytest.approx(0, abs=0.05)


def test_areas_and_log_ratios_are_uniform():
    torch.manual_seed(0)
    boxes, fits = random_boxes(4000, 200, 200, (0.1, 0.4), (0.5, 2.0))
    assert fits.all()
    height, width = boxes[:, 2].double(), boxes[:, 3].double()
    for drawn, low, high in ((height * width / 200**2, 0.1, 0.4), ((width / height).log2(), -1.0, 1.0)):
        counts = torch.histc((drawn - low) / (high - low), bins=5, min=0, max=1)
        assert counts.min() > 700  # 800 expected, standard deviation 25


def test_resized_crops_are_the_same_in_every_frame_and_differ_between_clips():
    torch.manual_seed(0)
    out = RandomResizedCrop(10)(coordinates(40, 40).expand(4, 2, 3, 40, 40))
    assert torch.equal(out[:, :, 1], out[:, :, 0])
    assert len(torch.unique(out[:, :, 0].flatten(1), dim=0)) == 4


def test_resized_crops_are_at_every_position():
    torch.manual_seed(0)
    crop = RandomResizedCrop(8, scale=(0.25, 0.25), ratio=(1.0, 1.0))
    outs = crop(coordinates(16, 16, frames=1).expand(600, -1, -1, -1, -1))
    corners = {(round(y.item() * 16), round(x.item() * 16)) for y, x in outs[:, :, 0, 0, 0]}
    assert corners == {(y, x) for y in range(9) for x in range(9)}


def test_image_without_a_fitting_crop_is_center_cropped():
    long = coordinates(8, 80, frames=1)  # half of the area at a ratio of at most 4/3 exceeds the height of the image
    out = RandomResizedCrop(8, scale=(0.5, 1.0))(long)[0, :, 0]
    h, w = sides(out, 8)
    assert (h, w) == pytest.approx((1.0, 11 / 80), abs=0.02)  # 8 * 4/3 pixels wide
    assert out[1].mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_flip_with_probability_0_and_1(probability):
    video = torch.rand(3, 3, 2, 8, 8)
    assert torch.equal(HorizontalFlip(probability)(video), video.flip(-1) if probability else video)


def test_flip_is_drawn_per_clip():
    torch.manual_seed(0)
    video = torch.arange(8.0).expand(400, 1, 2, 2, 8)
    flipped = HorizontalFlip(0.25)(video)[:, 0, :, 0, 0] == 7
    assert torch.equal(flipped[:, 0], flipped[:, 1])
    assert flipped[:, 0].float().mean() == pytest.approx(0.25, abs=0.06)


def holes(out: torch.Tensor) -> torch.Tensor:
    """Nonzero pixels (B, H, W) of an erased zero video; checks that they are equal in all frames and channels, and a
    rectangle."""
    changed = out != 0
    assert torch.equal(changed, changed[:, :1, :1].expand_as(changed))
    hole = changed[:, 0, 0]
    for rows, columns, pixels in zip(hole.any(2), hole.any(1), hole, strict=True):
        assert rows.sum() * columns.sum() == pixels.sum()
        for line in (rows, columns):
            indices = line.nonzero().flatten()
            assert len(indices) == 0 or indices[-1] - indices[0] + 1 == len(indices)
    return hole


@pytest.mark.parametrize("mode", ["noise", "constant"])
def test_erased_boxes_have_the_published_areas_and_ratios(mode):
    torch.manual_seed(0)
    hole = holes(RandomErasing(1.0, mode=mode)(torch.zeros(400, 3, 2, 50, 60)))
    share = hole.float().mean(dim=(1, 2))
    erased = share > 0
    assert erased.float().mean() > 0.99  # all except those that did not fit in ten draws
    assert share[erased].min() > 0.017  # rounded to pixels
    assert share.max() < 0.345
    assert share[erased].mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.015)
    ratio = hole.any(1).sum(1)[erased] / hole.any(2).sum(1)[erased]
    assert 0.25 < ratio.min() < 0.5
    assert 2.0 < ratio.max() < 3.8


def test_erasing_applies_with_its_probability():
    torch.manual_seed(0)
    hit = holes(RandomErasing()(torch.zeros(600, 3, 1, 20, 20))).flatten(1).any(1)
    assert hit.float().mean() == pytest.approx(0.25, abs=0.05)
    video = torch.rand(8, 3, 2, 8, 8)
    assert torch.equal(RandomErasing(0.0)(video), video)


def test_noise_is_standard_normal_after_normalization_and_independent_per_pixel_and_frame():
    torch.manual_seed(0)
    erase = RandomErasing(1.0, area=(1.0, 1.0), ratio=(1.0, 1.0))
    video = torch.zeros(1, 3, 8, 64, 64)
    normalized = (erase(video) - erase.mean) / erase.std
    for channel in normalized[0]:
        assert channel.mean() == pytest.approx(0, abs=0.02)
        assert channel.std() == pytest.approx(1, abs=0.02)
    assert normalized.unique().numel() > 0.95 * normalized.numel()


def test_constant_is_zero_after_normalization():
    erase = RandomErasing(1.0, area=(1.0, 1.0), ratio=(1.0, 1.0), mode="constant")
    assert not ((erase(torch.ones(1, 3, 2, 8, 8)) - erase.mean) / erase.std).any()
    assert erase.state_dict() == {}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RandomResizedCrop(8, scale=(0.0, 1.0)), r"augment\.scale=\(0\.0, 1\.0\)"),
        (lambda: RandomResizedCrop(8, scale=(0.5, 1.5)), r"augment\.scale=\(0\.5, 1\.5\)"),
        (lambda: RandomResizedCrop(8, ratio=(2.0, 1.0)), r"augment\.ratio=\(2\.0, 1\.0\)"),
        (lambda: HorizontalFlip(1.5), r"augment\.probability=1\.5\b.*\[0, 1\]"),
        (lambda: RandomErasing(-0.1), r"augment\.probability=-0\.1\b.*\[0, 1\]"),
        (lambda: RandomErasing(area=(0.5, 0.2)), r"augment\.area=\(0\.5, 0\.2\)"),
        (lambda: RandomErasing(mode="zeros"), r"augment\.mode='zeros'.*'noise'.*'constant'"),
    ],
)
def test_bad_arguments_raise(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize("augment", [RandomResizedCrop, MultiScaleCrop])
def test_without_antialias_crops_are_plain_bilinear(augment):
    """Rule of VideoMAE's fine-tuning and of V-JEPA: each output pixel mixes the 2 x 2 pixels around its center, which
    keeps more of the noise of a frame than the antialiased mean over the whole pixel."""
    noise = torch.rand(1, 1, 1, 96, 96)
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)} if augment is RandomResizedCrop else {"scales": (1.0,)}
    plain = augment(32, **whole, antialias=False)(noise)[0, 0, 0]
    centers = (torch.arange(32) + 0.5) * 3 - 0.5  # whole pixels: the mixture is the pixel itself
    torch.testing.assert_close(plain, noise[0, 0, 0][centers.long()][:, centers.long()])
    smooth = augment(32, **whole)(noise)[0, 0, 0]
    assert smooth.std() < 0.6 * plain.std()
    half = augment(48, **whole, antialias=False)(noise)[0, 0, 0]
    mean = noise[0, 0, 0].unfold(0, 2, 2).unfold(1, 2, 2).mean(dim=(2, 3))  # centers between two pixels
    torch.testing.assert_close(half, mean)
