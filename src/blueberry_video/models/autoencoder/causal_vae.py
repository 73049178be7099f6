"""Small causal 3-D variational autoencoder, to train from scratch.

As in the autoencoders of CogVideoX (arXiv 2408.06072) and HunyuanVideo (arXiv 2412.03603), the first frame is encoded
separately and later frames in groups, with causal convolutions. Unlike there, no norm spans frames, so causality is
exact: no frame changes earlier latents. Norms are over the channels of each position (as in Wan, arXiv 2503.20314),
because norms over a frame would remove the brightness of a uniform one.

Shapes: B clips, T frames, H x W rows and columns (at any level), C channels. Layers work on (B T, C, H, W), because 2-D
layers are fast.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from blueberry_video.models.autoencoder.base import Autoencoder
from blueberry_video.nn.running_average import RunningAverages, update_averages
from blueberry_video.weights.files import read_weights, resolve
from blueberry_video.weights.load import load_strictly

_TAPS = 3  # kernel size in time: the current frame and two earlier ones


class CausalVideoVAE(RunningAverages, Autoencoder):
    """Causal video autoencoder: videos (B, 3, T, H, W) in [-1, 1] to moments (B, 2C, t, h, w) and back.

    Args:
        channels: latent channels C.
        dims: width of each level, finest first. Each level after the first halves rows and columns.
        patch_size: pixels, in rows and columns, that are folded into channels before the first convolution.
        time_stride: frames per latent: 1, 2, 4, …; the last levels halve time.
        depth: residual blocks per level, in encoder and decoder.
        weights: checkpoint of the task ``autoencoding`` to load; None for random weights.

    Attributes:
        latent_mean, latent_std: running statistics (C,) of latents in training, used by :meth:`normalize`.

    Raises:
        ValueError: if the levels do not support the time stride, or the weights do not match.
    """

    first_frame_alone = True
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        channels: int = 8,
        dims: Sequence[int] = (16, 32, 64),
        patch_size: int = 2,
        time_stride: int = 4,
        depth: int = 1,
        weights: str | Path | None = None,
    ):
        levels = len(dims) - 1
        if time_stride not in (legal := [2**n for n in range(levels + 1)]):
            raise ValueError(
                f"time_stride={time_stride} is impossible with the {levels} halvings between {len(dims)} dims: use one "
                f"of {', '.join(map(str, legal))}, or add a level."
            )
        super().__init__(channels, (time_stride, patch_size * 2**levels, patch_size * 2**levels))
        self.patch_size = patch_size
        halves_time = [2 ** (levels - level) <= time_stride for level in range(levels)]
        pixels = 3 * patch_size**2
        down: list[nn.Module] = [CausalConv(pixels, dims[0])]
        for (dim, wider), time in zip(itertools.pairwise(dims), halves_time):
            down += [*(ResidualBlock(dim) for _ in range(depth)), Downsample(dim, wider, time)]
        up: list[nn.Module] = [CausalConv(channels, dims[-1])]
        for (dim, wider), time in reversed(list(zip(itertools.pairwise(dims), halves_time))):
            up += [*(ResidualBlock(wider) for _ in range(depth)), Upsample(wider, dim, time)]
        self.encoder = nn.ModuleList([*down, *(ResidualBlock(dims[-1]) for _ in range(depth))])
        self.decoder = nn.ModuleList([*up, *(ResidualBlock(dims[0]) for _ in range(depth))])
        self.to_moments = nn.Conv2d(dims[-1], 2 * channels, 1)
        self.to_pixels = nn.Conv2d(dims[0], pixels, 1)
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))
        self.init_weights()
        if weights is not None:
            self.load_published(weights)

    def init_weights(self) -> None:
        """Initializes layers to keep the variance of their inputs, and residual branches to zero.

        With PyTorch's default, the signal shrinks below the noise of the latents, which starts with a std of e^-2.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                seen = 1 if isinstance(module, nn.ConvTranspose2d) else module.weight[0, 0].numel()
                nn.init.normal_(module.weight, std=(module.in_channels * seen) ** -0.5)
                nn.init.zeros_(cast(Tensor, module.bias))
        nn.init.constant_(cast(Tensor, self.to_moments.bias)[self.channels :], -4.0)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                for parameter in module.time.parameters():
                    nn.init.zeros_(parameter)

    def encode(self, video: Tensor) -> Tensor:
        self.check(*video.shape[2:])
        p, num_frames = self.patch_size, video.shape[2]
        x = rearrange(video, "b c t (h p) (w q) -> (b t) (c p q) h w", p=p, q=p)
        for layer in self.encoder:
            x, num_frames = layer(x, num_frames)
        return rearrange(self.to_moments(x), "(b t) c h w -> b c t h w", t=num_frames)

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Decodes latents (B, C, t, h, w) that are not normalized to videos (B, 3, T, H, W), without clamping."""
        p, num_frames = self.patch_size, latents.shape[2]
        x = rearrange(latents, "b c t h w -> (b t) c h w")
        for layer in self.decoder:
            x, num_frames = layer(x, num_frames)
        return rearrange(self.to_pixels(x), "(b t) (c p q) h w -> b c t (h p) (w q)", t=num_frames, p=p, q=p)

    def decode(self, latents: Tensor) -> Tensor:
        return self.reconstruct(latents * _by_channel(self.latent_std) + _by_channel(self.latent_mean)).clamp(-1, 1)

    def normalize(self, latents: Tensor) -> Tensor:
        return (latents - _by_channel(self.latent_mean)) / _by_channel(self.latent_std)

    def averages(self) -> dict[str, Tensor]:
        return {"latent_mean": self.latent_mean, "latent_std": self.latent_std}

    def track(self, latents: Tensor, momentum: float = 0.01) -> None:
        """Updates the running statistics with latents (B, C, t, h, w), in at least 32 bits."""
        with self.wide_averages() as averages:
            mean, std = averages["latent_mean"], averages["latent_std"]
            latents = latents.to(mean.dtype)
            square = std.square() + mean.square()
            update_averages(
                [mean, square], [values.mean(dim=(0, 2, 3, 4)) for values in (latents, latents.square())], momentum
            )
            std.copy_((square - mean.square()).clamp(min=1e-6).sqrt())

    def load_published(self, weights: str | Path) -> str:
        """Loads a checkpoint of this package strictly and returns a message that names it.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if tensors are missing, unexpected or of a different shape.
        """
        state = read_weights(resolve(weights))
        fix = "Use a checkpoint of the task autoencoding, with the model settings of its training."
        load_strictly(self, state, weights, fix)
        return f"loaded {len(state)} tensors from {weights}"


class ChannelNorm(nn.Module):
    """RMSNorm over the channels of each position of (B, C, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.no_weight_decay = ("weight",)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-6) * self.weight[:, None, None]


class CausalConv(nn.Module):
    """Causal convolution over 3 frames: (B T, C, H, W) -> (B T', D, H, W).

    The first frame is repeated as padding. The 3 frames are concatenated along channels, for one 2-D convolution, which
    is many times faster than a 3-D one on the CPU.

    Args:
        in_channels, out_channels: C and D.
        kernel_size: kernel size in rows and columns, odd.
        time_stride: 2 keeps every second frame, starting with the first.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, time_stride: int = 1):
        super().__init__()
        self.time_stride = time_stride
        self.taps = nn.Conv2d(_TAPS * in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor, num_frames: int) -> tuple[Tensor, int]:
        clips = x.unflatten(0, (-1, num_frames))  # (B, T, C, H, W)
        padded = torch.cat([clips[:, :1]] * (_TAPS - 1) + [clips], dim=1)
        taps = [padded[:, tap : tap + num_frames : self.time_stride] for tap in range(_TAPS)]
        seen = torch.cat(taps, dim=2)  # (B, T', 3C, H, W)
        return self.taps(seen.flatten(0, 1)), seen.shape[1]


class ResidualBlock(nn.Module):
    """Residual block with two layers of norm, SiLU and convolution: over space, then over time."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(dim), ChannelNorm(dim)
        self.space = nn.Conv2d(dim, dim, 3, padding=1)
        self.time = CausalConv(dim, dim, kernel_size=1)

    def forward(self, x: Tensor, num_frames: int) -> tuple[Tensor, int]:
        inner = self.space(F.silu(self.norm1(x)))
        added, _ = self.time(F.silu(self.norm2(inner)), num_frames)
        return x + added, num_frames


class Downsample(nn.Module):
    """Downsampling by 2 of rows and columns and, with ``time``, of frames, starting with the first."""

    def __init__(self, dim: int, out_dim: int, time: bool):
        super().__init__()
        self.space = nn.Conv2d(dim, out_dim, 2, stride=2)
        self.time = CausalConv(out_dim, out_dim, kernel_size=1, time_stride=2) if time else None

    def forward(self, x: Tensor, num_frames: int) -> tuple[Tensor, int]:
        x = self.space(x)
        return (x, num_frames) if self.time is None else self.time(x, num_frames)


class Upsample(nn.Module):
    """Upsampling by 2 of rows and columns and, with ``time``, of all frames but the first."""

    def __init__(self, dim: int, out_dim: int, time: bool):
        super().__init__()
        self.time = CausalConv(dim, 2 * dim, kernel_size=1) if time else None
        self.space = nn.ConvTranspose2d(dim, out_dim, 2, stride=2)

    def forward(self, x: Tensor, num_frames: int) -> tuple[Tensor, int]:
        if self.time is not None:
            pairs, _ = self.time(x, num_frames)
            frames = rearrange(pairs, "(b t) (two c) h w -> b (t two) c h w", t=num_frames, two=2)
            x = frames[:, 1:].flatten(0, 1)  # the first frame is not doubled
            num_frames = 2 * num_frames - 1
        return self.space(x), num_frames


def _by_channel(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
