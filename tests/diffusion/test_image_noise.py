"""Image-to-video: latents of the image as additional channels, and noise augmentation of images."""

import re

import pytest
import torch

from blueberry_video.diffusion.image_noise import ImageNoise, image_channels


def test_image_is_the_first_frame_followed_by_zeros():
    image = torch.randn(2, 3, 1, 4, 5)
    channels = image_channels(image, 6)
    assert channels.shape == (2, 3, 6, 4, 5)
    assert torch.equal(channels[:, :, :1], image)
    assert (channels[:, :, 1:] == 0).all()


@pytest.mark.parametrize(("shape", "num_frames"), [((2, 3, 2, 4, 5), 6), ((3, 1, 4, 5), 6), ((2, 3, 1, 4, 5), 0)])
def test_bad_input_raises(shape: tuple[int, ...], num_frames: int):
    with pytest.raises(ValueError, match=rf"{re.escape(str(shape))}.*num_frames={num_frames}\b.*\(B, C, 1, H, W\)"):
        image_channels(torch.randn(shape), num_frames)


def test_noise_scale_is_the_published_log_normal_per_clip():
    torch.manual_seed(0)
    noise = ImageNoise()(torch.zeros(2000, 3, 1, 8, 8))
    logs = noise.flatten(1).std(dim=1).log()
    assert abs(logs.mean() + 3.0) < 0.05
    assert abs(logs.std() - 0.5) < 0.05
    assert noise.mean().abs() < 1e-3


def test_noise_is_added_and_keeps_the_dtype():
    torch.manual_seed(0)
    images = torch.full((4, 3, 1, 16, 16), 0.5).bfloat16()
    noisy = ImageNoise(mean=-2.0, std=0.0)(images)
    assert noisy.dtype == torch.bfloat16
    assert abs(noisy.float().mean() - 0.5) < 0.01
    assert abs(noisy.float().std() - torch.tensor(-2.0).exp()) < 0.01


def test_negative_std_raises():
    with pytest.raises(ValueError, match=r"task\.image_noise\.std=-0\.5"):
        ImageNoise(std=-0.5)
