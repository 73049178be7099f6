"""Clips that begin with a picture, as CogVideoX makes them (arXiv 2408.06072): the picture's latent stands behind the
noisy latents along the channels, at the first frame, with zeros at all others. In training the picture is noisy, too.
"""

import torch.nn.functional as F
from torch import Tensor

from blueberry_video.nn.noise import standard_normal


class ImageNoise:
    """Noise on the pictures that a network is given in training, before they are encoded: those that it will be
    given later, of other cameras, drawn or compressed, are none of the training clips' first frames.

    CogVideoX-I2V was trained with it: ``noised_image_input`` in sat/configs/cogvideox_5b_i2v.yaml of THUDM/CogVideo.
    The numbers are those of diffusers' fine-tuning, examples/cogvideo/train_cogvideox_image_to_video_lora.py. Of
    HunyuanVideo-I2V and 1.5 none is known.

    Args:
        mean, std: of the natural logarithm of the noise's standard deviation, which is drawn for every clip.

    Raises:
        ValueError: for a negative ``std``.
    """

    def __init__(self, mean: float = -3.0, std: float = 0.5):
        if std < 0:
            raise ValueError(f"task.image_noise.std={std} is a standard deviation: 0.5 as published, 0 for none.")
        self.mean, self.std = mean, std

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, 1, H, W) in [-1, 1] -> the same, noisy, not clamped. Draws from torch's global generator."""
        spread = standard_normal((len(images), 1, 1, 1, 1), None, images.device)
        sigma = (self.mean + self.std * spread).exp()
        return images + (sigma * standard_normal(images.shape, None, images.device)).to(images.dtype)


def image_channels(image: Tensor, num_frames: int) -> Tensor:
    """The channels that tell a network of its first frame.

    Args:
        image: (B, C, 1, H, W), latents of the picture in the scale of the network: ``Autoencoder.image_latents``
            (CogVideoX 1.5 was trained on pictures divided by the scale that its videos are multiplied by).
        num_frames: latent frames of the clip.

    Returns:
        (B, C, num_frames, H, W).

    Raises:
        ValueError: for latents of several frames, or no frame to make.
    """
    if image.ndim != 5 or image.shape[2] != 1 or num_frames < 1:
        raise ValueError(
            f"an image's latents of {tuple(image.shape)} for num_frames={num_frames}: they are (B, C, 1, H, W), and a "
            "clip has at least one frame."
        )
    return F.pad(image, (0, 0, 0, 0, 0, num_frames - 1))
