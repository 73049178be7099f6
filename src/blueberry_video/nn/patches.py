"""Pixels of patches: cutting a video up, normalising and comparing patches, gathering tokens, and putting it together
again.
"""

from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


class NormalizedPatches(NamedTuple):
    """Patches with zero mean and unit variance per channel, and what undoes that."""

    patches: Tensor  # (B, N, P, C)
    mean: Tensor  # (B, N, 1, C)
    std: Tensor  # (B, N, 1, C)


def patchify(video: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """(B, C, T, H, W) -> (B, N, P, C):

    N patches in (t, h, w) raster, each with its P = pt * ph * pw pixels in the same raster.
    """
    pt, ph, pw = patch_size
    # The pixels of a channel side by side in memory: what normalises them is several times faster.
    return rearrange(video, "b c (t pt) (h ph) (w pw) -> b (t h w) c (pt ph pw)", pt=pt, ph=ph, pw=pw).transpose(2, 3)


def unpatchify(patches: Tensor, grid: tuple[int, int, int], patch_size: tuple[int, int, int]) -> Tensor:
    """The inverse of :func:`patchify`: (B, N, P, C) and the grid (t, h, w) -> (B, C, T, H, W)."""
    (t, h, w), (pt, ph, pw) = grid, patch_size
    pattern = "b (t h w) (pt ph pw) c -> b c (t pt) (h ph) (w pw)"
    return rearrange(patches, pattern, t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)


def normalize_patches(patches: Tensor, eps: float = 1e-6, eps_under_root: bool = False) -> NormalizedPatches:
    """Per patch **and per channel** over its pixels, with the unbiased variance, as VideoMAE does.

    Normalising over all P * C values at once, or with the biased variance, trains another model.

    Args:
        patches: (B, N, P, C).
        eps: keeps constant patches finite.
        eps_under_root: divide by sqrt(variance + eps), as OmniMAE does, and not by sqrt(variance) + eps: patches of
            little contrast then come out smaller.
    """
    mean = patches.mean(dim=2, keepdim=True)
    centred = patches - mean
    # Written out: torch.var takes a hundred times as long as these two passes on the CPU.
    variance = centred.square().sum(dim=2, keepdim=True) / (patches.shape[2] - 1)
    std = (variance + eps).sqrt() if eps_under_root else variance.sqrt() + eps
    return NormalizedPatches(centred / std, mean, std)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """(B, N, ...) and indices (B, K) -> (B, K, ...)."""
    trailing = tokens.shape[2:]
    index = index.reshape(*index.shape, *[1] * len(trailing)).expand(*index.shape, *trailing)
    return tokens.gather(1, index)


def token_mse(predicted: Tensor, truth: Tensor, scored: Tensor | None = None) -> Tensor:
    """Mean squared error of tokens (B, N, K): of all, or of those where ``scored`` (B, N) is true.

    All scored tokens of the batch count alike, also where samples have different numbers of them.
    """
    if scored is None:
        return F.mse_loss(predicted, truth)
    return ((predicted - truth).square().mean(dim=2) * scored).sum() / scored.sum()
