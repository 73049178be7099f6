"""Colors of depth: one fixed range per clip, ends of the color map, invalid pixels, and ranges."""

import pytest
import torch

from blueberry_video.inference.depth_pictures import COLORS, colored, range_of


def test_the_same_value_has_the_same_color_in_all_frames_of_a_clip():
    maps = torch.tensor([[[[0.0, 1.0]], [[1.0, 2.0]]], [[[10.0, 30.0]], [[30.0, 50.0]]]])  # (2, 2, 1, 2)
    colors = colored(maps, *range_of(maps))
    assert colors.shape == (2, 3, 2, 1, 2)
    torch.testing.assert_close(colors[0, :, 0, 0, 1], colors[0, :, 1, 0, 0])
    torch.testing.assert_close(colors[0], colors[1])  # ranges 0 to 2 and 10 to 50
    torch.testing.assert_close(colors[0, :, 0, 0, 0], torch.tensor(COLORS[0]))
    torch.testing.assert_close(colors[0, :, 0, 0, 1], torch.tensor(COLORS[4]))
    torch.testing.assert_close(colors[0, :, 1, 0, 1], torch.tensor(COLORS[-1]))


def test_values_outside_the_range_are_clamped_and_invalid_ones_are_gray():
    maps = torch.tensor([-5.0, 0.3, 9.0, torch.nan, torch.inf]).view(1, 1, 1, 5)
    colors = colored(maps, torch.zeros(1), torch.ones(1))[0, :, 0, 0]
    torch.testing.assert_close(colors[:, 0], torch.tensor(COLORS[0]))
    torch.testing.assert_close(colors[:, 2], torch.tensor(COLORS[-1]))
    assert colors[:, 3].tolist() == [0.5, 0.5, 0.5]
    torch.testing.assert_close(colors[:, 4], torch.tensor(COLORS[-1]))
    assert 0 <= colors.min() <= colors.max() <= 1


def test_brightness_grows_with_the_value():
    maps = torch.linspace(0, 1, 50).view(1, 1, 1, 50)
    luma = (colored(maps, *range_of(maps)) * torch.tensor([0.2126, 0.7152, 0.0722]).view(1, 3, 1, 1, 1)).sum(1)
    assert (luma.flatten().diff() > 0).all()


@pytest.mark.parametrize("values", [[3.0, 3.0], [torch.nan, torch.nan]])
def test_constant_and_invalid_clips_have_finite_colors(values: list[float]):
    maps = torch.tensor(values).view(1, 1, 1, 2)
    assert colored(maps, *range_of(maps)).isfinite().all()


def test_ranges_ignore_invalid_pixels():
    low, high = range_of(torch.tensor([[[[2.0, torch.nan, 5.0]]], [[[torch.nan] * 3]]]))
    assert (low.tolist(), high.tolist()) == ([2, 0], [5, 1])
