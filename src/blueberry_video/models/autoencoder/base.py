"""Base class of video autoencoders, and the identity autoencoder.

Letters: B clips, T frames, H W rows and columns of pixels; C channels, t h w frames, rows and columns of latents.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from blueberry_video.nn.noise import standard_normal


class Autoencoder(nn.Module, ABC):
    """Base of an autoencoder of videos in [-1, 1].

    The first frame is coded alone, later ones in groups, so that a clip has 1 + k · ``frame_step`` frames.

    Args:
        channels: C.
        stride: pixels (t, h, w) that a latent stands for.
        frame_step: frames that may be added to the first one at a time: a multiple of ``stride[0]``; by default that.

    Attributes:
        first_frame_alone: whether the first latent frame depends on the first frame alone. In published autoencoders
            norms span the frames of a clip, so that it is not that of the same picture as an image.

    Raises:
        ValueError: a ``frame_step`` that is no multiple of the stride.
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
        """(B, 3, T, H, W) in [-1, 1] -> moments (B, 2C, t, h, w): means, then log-variances, not scaled."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, t, h, w), as :meth:`latents` gives them -> video (B, 3, T, H, W) in [-1, 1]."""

    def latents(self, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Moments (B, 2C, t, h, w) -> a sample (B, C, t, h, w), normalised for the network that models it.

        With a ``generator`` the noise is drawn from it, else from the global one.
        """
        return self.normalize(sample(moments, generator))

    def normalize(self, latents: Tensor) -> Tensor:
        """Scales latents to about zero mean and unit variance. The identity by default."""
        return latents

    def image_latents(self, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """As :meth:`latents`, for the frame that an image-to-video network is given: some have another scale."""
        return self.latents(moments, generator)

    def grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(t, h, w) of the latents of a clip."""
        return (num_frames - 1) // self.stride[0] + 1, height // self.stride[1], width // self.stride[2]

    def check(self, num_frames: int, height: int, width: int, patch_size: tuple[int, int] = (1, 1)) -> None:
        """Judges the size of a clip.

        Args:
            num_frames, height, width: in pixels.
            patch_size: rows and columns of latents that the network takes together.

        Raises:
            ValueError: the autoencoder or the network cannot take it; the message names the nearest legal values.
        """
        if num_frames < 1 or (num_frames - 1) % self.frame_step:
            near = " or ".join(map(str, _neighbours(num_frames - 1, self.frame_step, offset=1, least=1)))
            raise ValueError(
                f"num_frames={num_frames} is not 1 + a multiple of {self.frame_step}, as {type(self).__name__} codes "
                f"the first frame alone and then {self.frame_step} at a time: use {near}."
            )
        for key, value, stride, patch in zip(("height", "width"), (height, width), self.stride[1:], patch_size):
            unit = stride * patch
            if value < unit or value % unit:
                near = " or ".join(map(str, _neighbours(value, unit, offset=0, least=unit)))
                raise ValueError(
                    f"{key}={value} is no multiple of {unit}, what a latent of {type(self).__name__} covers"
                    f"{f' ({stride} pixels) times the patch of the network ({patch})' if patch > 1 else ''}: use "
                    f"{near}."
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


def sample(moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Means and log-variances (B, 2C, t, h, w) -> draws (B, C, t, h, w), in the moments' dtype, computed in fp32."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    noise = standard_normal(mean.shape, generator, mean.device)
    return (mean + noise * (log_variance.clamp(max=20) / 2).exp()).to(moments.dtype)


def fingerprint(module: nn.Module) -> str:
    """16 hexadecimal digits that tell whether stored latents or text belong to a module.

    They change with its class, with its public settings (numbers and words that are its attributes), and with the name,
    type, shape or a value of any of its weights and buffers.
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
    """The multiples of ``step`` around ``value``, each plus ``offset``, the nearest first, none below ``least``."""
    below = value // step * step
    found = sorted((below, below + step), key=lambda multiple: abs(multiple - value))
    return [multiple + offset for multiple in found if multiple + offset >= least] or [least]
