"""Image conditioning of CogVideoX (arXiv 2408.06072): latents of the first frame, zero-padded to all frames and
concatenated along channels, and noise augmentation of the image in training.
"""

import torch.nn.functional as F
from torch import Tensor

from blueberry_video.nn.noise import standard_normal


class ImageNoise:
    """Noise augmentation of the conditioning image in training, before encoding.

    It reduces the gap to images at inference, which are not first frames of training clips. CogVideoX-I2V is trained
    with it: ``noised_image_input`` in sat/configs/cogvideox_5b_i2v.yaml of THUDM/CogVideo. The values are those of
    examples/cogvideo/train_cogvideox_image_to_video_lora.py in diffusers. None is known for HunyuanVideo-I2V and 1.5.

    Args:
        mean, std: of the natural logarithm of the noise's standard deviation, drawn per clip.

    Raises:
        ValueError: for a negative ``std``.
    """

    def __init__(self, mean: float = -3.0, std: float = 0.5):
        if std < 0:
            raise ValueError(f"task.image_noise.std={std} must not be negative: 0.5 as published, 0 for a fixed level.")
        self.mean, self.std = mean, std

    def __call__(self, images: Tensor) -> Tensor:
        """Adds noise of torch's global generator to images (B, 3, 1, H, W) in [-1, 1], without clamping."""
        spread = standard_normal((len(images), 1, 1, 1, 1), None, images.device)
        sigma = (self.mean + self.std * spread).exp()
        return images + (sigma * standard_normal(images.shape, None, images.device)).to(images.dtype)


def image_channels(image: Tensor, num_frames: int) -> Tensor:
    """Zero-pads image latents (B, C, 1, H, W) to (B, C, num_frames, H, W).

    Latents are scaled by ``Autoencoder.image_latents``: for CogVideoX 1.5, images are divided by the scale of videos.

    Raises:
        ValueError: for latents of several frames, or no frame to predict.
    """
    if image.ndim != 5 or image.shape[2] != 1 or num_frames < 1:
        raise ValueError(
            f"image latents of {tuple(image.shape)} for num_frames={num_frames} must be (B, C, 1, H, W), with "
            "num_frames of at least 1."
        )
    return F.pad(image, (0, 0, 0, 0, 0, num_frames - 1))
