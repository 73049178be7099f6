"""The multi-scale crop, on videos whose pixels tell where they came from."""

import pytest
import torch

from blueberry_video.nn.augment import OFFSETS, MultiScaleCrop


def coordinates(height: int, width: int, frames: int = 3) -> torch.Tensor:
    """(1, 2, T, H, W): each pixel holds its own row and column, in [0, 1]."""
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    return torch.stack([y, x])[None, :, None].expand(1, 2, frames, height, width)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 48), (48, 24)])
def test_size_of_the_result(height, width):
    out = MultiScaleCrop(16)(torch.rand(2, 3, 4, height, width))
    assert out.shape == (2, 3, 4, 16, 16)
    assert out.min() >= 0
    assert out.max() <= 1


def test_every_frame_gets_the_same_crop_and_clips_get_different_ones():
    torch.manual_seed(0)
    video = coordinates(40, 40).expand(4, 2, 3, 40, 40)
    out = MultiScaleCrop(20, flip=0.5)(video)
    for frame in range(1, 3):
        assert torch.equal(out[:, :, frame], out[:, :, 0])
    assert len(torch.unique(out[:, :, 0].flatten(1), dim=0)) == 4


def test_a_full_crop_of_the_same_size_changes_nothing():
    video = torch.rand(2, 3, 4, 16, 16)
    torch.testing.assert_close(MultiScaleCrop(16, scales=(1.0,))(video), video)


def test_crops_have_the_scales_asked_for_at_most_one_step_apart():
    """Read back from the coordinates: the span of rows and columns in the result is the crop's height and width."""
    torch.manual_seed(0)
    size, seen = 100, set()
    crop = MultiScaleCrop(50, scales=(1.0, 0.8, 0.5))
    for _ in range(150):
        out = crop(coordinates(size, size, frames=1))[0, :, 0]
        step_y, step_x = (out[0, 30, 25] - out[0, 20, 25]) / 10, (out[1, 25, 30] - out[1, 25, 20]) / 10
        seen.add((round(step_y.item() * 50, 2), round(step_x.item() * 50, 2)))
    assert seen == {(1.0, 1.0), (1.0, 0.8), (0.8, 1.0), (0.8, 0.8), (0.8, 0.5), (0.5, 0.8), (0.5, 0.5)}


def test_flip_mirrors_columns_alone():
    video = torch.rand(2, 3, 2, 8, 8)
    torch.testing.assert_close(MultiScaleCrop(8, scales=(1.0,), flip=1.0)(video), video.flip(-1))


def test_crops_lie_at_the_thirteen_places():
    torch.manual_seed(0)
    crop = MultiScaleCrop(12, scales=(0.6,))  # 12 of 20 pixels: a quarter of the room is 2
    outs = torch.cat([crop(coordinates(20, 20, frames=1)) for _ in range(400)])
    corners = {(round(y.item() * 20), round(x.item() * 20)) for y, x in outs[:, :2, 0, 0, 0]}
    assert corners == {(2 * down, 2 * across) for down, across in OFFSETS}
    assert len(corners) == 13


def test_a_size_close_to_the_result_is_taken_as_it():
    video = torch.rand(1, 3, 2, 20, 20)
    crop = MultiScaleCrop(16, scales=(0.9,))  # 18 pixels become 16: cut out, not resized
    cut = crop(video)
    assert any(torch.equal(cut, video[..., top : top + 16, left : left + 16]) for top in range(5) for left in range(5))


def test_draws_follow_the_seed():
    video, crop = torch.rand(2, 3, 4, 32, 32), MultiScaleCrop(16, flip=0.5)
    torch.manual_seed(5)
    first = crop(video)
    torch.manual_seed(5)
    assert torch.equal(crop(video), first)


@pytest.mark.parametrize("scales", [(), (0.0,), (1.0, 1.2), (-0.5,)])
def test_bad_scales_are_refused(scales):
    with pytest.raises(ValueError, match=r"augment\.scales"):
        MultiScaleCrop(16, scales=scales)


@pytest.mark.parametrize("flip", [-0.1, 1.1])
def test_bad_flip_is_refused(flip):
    with pytest.raises(ValueError, match=rf"augment\.flip={flip} is not a probability"):
        MultiScaleCrop(16, flip=flip)
