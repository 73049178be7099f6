"""Base class of video autoencoders, and the identity autoencoder.

Shapes: B clips, T frames, H x W pixels; C channels, t x h x w latent frames, rows and columns.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from blueberry_video.nn.noise import Generator, standard_normal


class Autoencoder(nn.Module, ABC):
    """Base class of autoencoders of videos in [-1, 1].

    The first frame is encoded separately and later frames in groups, so clips have 1 + k · ``frame_step`` frames.

    Args:
        channels: latent channels C.
        stride: pixels (t, h, w) per latent.
        frame_step: frames per group, a multiple of ``stride[0]`` and by default equal to it.

    Attributes:
        first_frame_alone: whether the first latent frame depends only on the first frame. In published autoencoders
            norms span the frames of a clip, so it differs from the latents of the first frame as an image.

    Raises:
        ValueError: if ``frame_step`` is not a multiple of the stride.
    """

    first_frame_alone: ClassVar[bool] = False

    def __init__(self, channels: int, stride: tuple[int, int, int], frame_step: int | None = None):
        super().__init__()
        self.channels, self.stride = channels, stride
        self.frame_step = stride[0] if frame_step is None else frame_step
        if self.frame_step < 1 or self.frame_step % stride[0]:
            raise ValueError(
                f"frame_step={frame_step} must be a multiple of the stride in time: use {stride[0]} or a multiple."
            )

    @abstractmethod
    def encode(self, video: Tensor) -> Tensor:
        """Encodes videos (B, 3, T, H, W) in [-1, 1] to moments (B, 2C, t, h, w): unscaled means and log-variances."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes normalized latents (B, C, t, h, w) to videos (B, 3, T, H, W) in [-1, 1]."""

    def latents(self, moments: Tensor, generator: Generator = None) -> Tensor:
        """Samples normalized latents (B, C, t, h, w) from moments (B, 2C, t, h, w); see :func:`sample`."""
        return self.normalize(sample(moments, generator))

    def normalize(self, latents: Tensor) -> Tensor:
        """Scales latents to about zero mean and unit variance. Defaults to the identity."""
        return latents

    def image_latents(self, moments: Tensor, generator: Generator = None) -> Tensor:
        """Samples latents for image conditioning, where some autoencoders use a different scale."""
        return self.latents(moments, generator)

    def grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns the latent size (t, h, w) of a clip."""
        return (num_frames - 1) // self.stride[0] + 1, height // self.stride[1], width // self.stride[2]

    def check(self, num_frames: int, height: int, width: int, patch_size: tuple[int, int] = (1, 1)) -> None:
        """Checks the size of a clip.

        Args:
            num_frames, height, width: size in frames and pixels.
            patch_size: rows and columns of latents per patch of the network.

        Raises:
            ValueError: if it is not a multiple of strides and patches; the message names the nearest legal values.
        """
        if num_frames < 1 or (num_frames - 1) % self.frame_step:
            near = " or ".join(map(str, _neighbours(num_frames - 1, self.frame_step, offset=1, least=1)))
            raise ValueError(
                f"num_frames={num_frames} must be 1 + a multiple of {self.frame_step}, because {type(self).__name__} "
                f"encodes the first frame separately and then {self.frame_step} frames at a time: use {near}."
            )
        for key, value, stride, patch in zip(("height", "width"), (height, width), self.stride[1:], patch_size):
            unit = stride * patch
            if value < unit or value % unit:
                near = " or ".join(map(str, _neighbours(value, unit, offset=0, least=unit)))
                raise ValueError(
                    f"{key}={value} must be a multiple of {unit}, the stride of {type(self).__name__}"
                    f"{f' ({stride}) times the patch size ({patch})' if patch > 1 else ''}: use {near}."
                )


class Pixels(Autoencoder):
    """Identity autoencoder: the latents are the pixels in [-1, 1]; log-variances are -inf (no noise)."""

    first_frame_alone = True

    def __init__(self) -> None:
        super().__init__(channels=3, stride=(1, 1, 1))

    def encode(self, video: Tensor) -> Tensor:
        return torch.cat([video, torch.full_like(video, -torch.inf)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.clamp(-1, 1)


def sample(moments: Tensor, generator: Generator = None) -> Tensor:
    """Samples (B, C, t, h, w) from means and log-variances (B, 2C, t, h, w), computed in float32, in their dtype.

    Noise is drawn from ``generator``, one or one per clip, or from torch's global one.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    noise = standard_normal(mean.shape, generator, mean.device)
    return (mean + noise * (log_variance.clamp(max=20) / 2).exp()).to(moments.dtype)


def fingerprint(module: nn.Module) -> str:
    """Returns 16 hexadecimal digits that identify the module that wrote stored latents or text.

    They change with its class, its public attributes (numbers, strings, tuples), and the name, dtype, shape or any
    value of its parameters and buffers.
    """
    digest = hashlib.sha256(type(module).__qualname__.encode())
    settings = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    plain = {name: value for name, value in settings.items() if isinstance(value, int | float | str | tuple | None)}
    digest.update(json.dumps(plain, sort_keys=True).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _neighbours(value: int, step: int, offset: int, least: int) -> list[int]:
    """Returns the multiples of ``step`` around ``value``, plus ``offset``, nearest first, none below ``least``."""
    below = value // step * step
    found = sorted((below, below + step), key=lambda multiple: abs(multiple - value))
    return [multiple + offset for multiple in found if multiple + offset >= least] or [least]
