"""Color jitter and blur: ranges, the same change in all frames, identities, and bad arguments."""

import numpy as np
import pytest
import torch

from blueberry_video.augmentation import ColorJitter, GaussianBlur


def still(clips: int = 3, frames: int = 4) -> torch.Tensor:
    """Random clips of equal frames."""
    image = torch.rand(clips, 3, 1, 9, 8, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    return image.expand(-1, -1, frames, -1, -1).contiguous()


@pytest.mark.parametrize("module", [ColorJitter(probability=1.0), GaussianBlur((0.5, 2.0), 1.0)])
def test_frames_of_a_clip_change_equally_and_clips_differently(module: torch.nn.Module):
    video = still()
    video[2] = video[1]
    changed = module(video)
    assert changed.shape == video.shape
    torch.testing.assert_close(changed[:, :, 1:], changed[:, :, :-1])
    assert (changed - video).flatten(1).abs().amax(1).min() > 0.01
    assert not torch.allclose(changed[1], changed[2])
    assert 0 <= changed.min() <= changed.max() <= 1


@pytest.mark.parametrize(
    "module", [ColorJitter(probability=0.0), GaussianBlur(probability=0.0), ColorJitter(0, 0, 0, 0, 1.0)]
)
def test_nothing_changes_without_strength_or_probability(module: torch.nn.Module):
    torch.testing.assert_close(module(still()), still())


def test_about_the_given_share_of_clips_changes():
    video = still(200, 1)
    for module in (ColorJitter(probability=0.3), GaussianBlur((1.0, 2.0), 0.3)):
        share = (module(video) != video).flatten(1).any(1).float().mean()
        assert 0.2 < share < 0.4


def test_each_strength_changes_what_it_names():
    video = still(20, 1)
    bright = ColorJitter(0.4, 0, 0, 0, 1.0)(video)
    ratio = (bright / video).clamp(max=1.4).flatten(1)
    torch.testing.assert_close(ratio[:, :1].expand(-1, 10), ratio[:, :10])
    assert 0.6 <= ratio.min() < 0.8 < 1.2 < ratio.max() <= 1.41
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1, 1)
    saturated = ColorJitter(0, 0, 0.3, 0, 1.0)(video)
    torch.testing.assert_close((saturated * luma).sum(1), (video * luma).sum(1))
    contrasted = ColorJitter(0, 0.3, 0, 0, 1.0)(video)
    mean = (video * luma).sum(1).mean((1, 2, 3))
    torch.testing.assert_close((contrasted * luma).sum(1).mean((1, 2, 3)), mean, rtol=1e-3, atol=1e-3)
    rotated = ColorJitter(0, 0, 0, 0.05, 1.0)(video)
    torch.testing.assert_close(rotated.sum(1), video.sum(1))
    gray = torch.full((2, 3, 1, 4, 4), 0.4)
    torch.testing.assert_close(ColorJitter(0, 0, 0, 0.5, 1.0)(gray), gray)


def test_blur_equals_a_dense_kernel():
    image = np.zeros((15, 15))
    image[7, 7] = 1
    module = GaussianBlur((1.5, 1.5), 1.0)
    blurred = module(torch.from_numpy(image)[None, None, None])[0, 0, 0].numpy()
    rows, columns = np.mgrid[-5:6, -5:6]
    kernel = np.exp(-(rows**2 + columns**2) / (2 * 1.5**2))
    np.testing.assert_allclose(blurred[2:13, 2:13], kernel / kernel.sum(), rtol=1e-6)
    flat = torch.full((1, 3, 2, 5, 6), 0.3)
    torch.testing.assert_close(module(flat), flat)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ColorJitter(brightness=-1), r"augment\.brightness=-1\b"),
        (lambda: ColorJitter(hue=0.6), r"augment\.hue=0\.6\b"),
        (lambda: ColorJitter(probability=2), r"augment\.probability=2\b"),
        (lambda: GaussianBlur((0, 1)), r"augment\.sigma=\(0, 1\)"),
        (lambda: GaussianBlur((2, 1)), r"augment\.sigma=\(2, 1\)"),
        (lambda: GaussianBlur(probability=-1), r"augment\.probability=-1\b"),
    ],
)
def test_bad_arguments_raise(make, match: str):
    with pytest.raises(ValueError, match=match):
        make()
