"""Patches of pixels: patchify and unpatchify, normalization, gathering and mean squared error."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


class NormalizedPatches(NamedTuple):
    """Patches with zero mean and unit variance, and the statistics to invert the normalization."""

    patches: Tensor  # (B, N, P, C)
    mean: Tensor  # (B, N, 1, C), or (B, N, 1, 1) unless normalized per channel
    std: Tensor  # like mean


def patchify(video: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Splits a video into patches: (B, C, T, H, W) -> (B, N, P, C).

    The N patches are in (t, h, w) raster, and the P = pt * ph * pw pixels of each as well.
    """
    pt, ph, pw = patch_size
    # The pixels of a channel are contiguous in memory, which makes normalization several times faster.
    return rearrange(video, "b c (t pt) (h ph) (w pw) -> b (t h w) c (pt ph pw)", pt=pt, ph=ph, pw=pw).transpose(2, 3)


def unpatchify(patches: Tensor, grid: tuple[int, int, int], patch_size: tuple[int, int, int]) -> Tensor:
    """Inverse of :func:`patchify`: (B, N, P, C) and the grid (t, h, w) -> (B, C, T, H, W)."""
    (t, h, w), (pt, ph, pw) = grid, patch_size
    pattern = "b (t h w) (pt ph pw) c -> b c (t pt) (h ph) (w pw)"
    return rearrange(patches, pattern, t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)


def normalize_patches(
    patches: Tensor, eps: float = 1e-6, eps_under_root: bool = False, over: str = "channel"
) -> NormalizedPatches:
    """Normalizes each patch **and channel** over its pixels, with the unbiased variance, as VideoMAE does.

    Normalizing over all P * C values at once, or with the biased variance, trains a different model.

    Args:
        patches: (B, N, P, C).
        eps: keeps constant patches finite.
        eps_under_root: divide by sqrt(variance + eps), as OmniMAE does, instead of sqrt(variance) + eps; the values of
            low-contrast patches are then smaller.
        over: values with a common mean and variance: those of a ``"channel"`` of a patch, or of the whole ``"patch"``,
            an option of OmniMAE; ``"none"`` leaves the pixels unchanged, an option of VideoMAE.

    Raises:
        ValueError: ``over`` is unknown.
    """
    if over not in ("channel", "patch", "none"):
        raise ValueError(f"normalization over={over!r} is unknown: choose 'channel', 'patch' or 'none'.")
    if over == "none":
        one = torch.ones_like(patches[:, :, :1, :1])
        return NormalizedPatches(patches, torch.zeros_like(one), one)
    axes = (2,) if over == "channel" else (2, 3)
    mean = patches.mean(dim=axes, keepdim=True)
    centred = patches - mean
    # Not torch.var, which is a hundred times slower on the CPU.
    count = math.prod(patches.shape[axis] for axis in axes)
    variance = centred.square().sum(dim=axes, keepdim=True) / (count - 1)
    std = (variance + eps).sqrt() if eps_under_root else variance.sqrt() + eps
    return NormalizedPatches(centred / std, mean, std)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Gathers tokens (B, N, ...) at indices (B, K) -> (B, K, ...)."""
    trailing = tokens.shape[2:]
    index = index.reshape(*index.shape, *[1] * len(trailing)).expand(*index.shape, *trailing)
    return tokens.gather(1, index)


def token_mse(predicted: Tensor, truth: Tensor, scored: Tensor | None = None, by_clip: bool = False) -> Tensor:
    """Mean squared error of tokens (B, N, K), optionally only where ``scored`` (B, N) is true.

    ``by_clip`` weights clips equally rather than by their number of scored tokens, as a mean over several batches
    requires.
    """
    if scored is None:
        return F.mse_loss(predicted, truth)
    errors = (predicted - truth).square().mean(dim=2) * scored
    return (errors.sum(dim=1) / scored.sum(dim=1)).mean() if by_clip else errors.sum() / scored.sum()
