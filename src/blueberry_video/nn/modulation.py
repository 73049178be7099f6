"""adaLN modulation (Peebles and Xie, arXiv 2212.09748) with one conditioning vector per clip or per frame.

Shift, scale and gate are (B, K, D) for tokens (B, N, D): K = 1, or K frames of N / K consecutive tokens each. They are
never expanded to the size of the tokens.
"""

import torch
from torch import Tensor


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Computes x * (1 + scale) + shift in one pass over x (B, N, D); shift and scale are (B, K, D)."""
    return torch.addcmul(shift[:, :, None], _frames(x, shift), 1 + scale[:, :, None]).flatten(1, 2)


def gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """Gated residual x + gate * branch: x and branch (B, N, D), gate (B, K, D)."""
    return torch.addcmul(_frames(x, gate), gate[:, :, None], _frames(branch, gate)).flatten(1, 2)


def _frames(x: Tensor, values: Tensor) -> Tensor:
    """(B, N, D) -> (B, K, N / K, D)."""
    num_frames = values.shape[1]
    return x.unflatten(1, (num_frames, x.shape[1] // num_frames))
