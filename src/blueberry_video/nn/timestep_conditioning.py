"""Timestep conditioning of diffusion transformers: sinusoidal embedding (Ho et al., arXiv 2006.11239), MLP, and adaLN
modulation (Peebles and Xie, arXiv 2212.09748) with one conditioning vector per clip or per frame.

Shift, scale and gate are (B, K, D) for tokens (B, N, D): K = 1, or K frames of N / K consecutive tokens each. They are
never expanded to the size of the tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PERIOD = 10000.0  # frequency i of n is PERIOD ** (-i / n) radians per unit of time


def sinusoidal(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding (...) -> (..., dim), always float32: cosines, then sines, at ``dim // 2`` frequencies.

    Args:
        t: timesteps in the unit of the model, [0, 1000] in CogVideoX and HunyuanVideo; may be fractional.
        dim: number of channels; even.

    Raises:
        ValueError: if ``dim`` is odd or below 2.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim={dim} of the sinusoid must be even and at least 2.")
    half = dim // 2
    frequency = torch.exp(-math.log(PERIOD) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t.float()[..., None] * frequency  # (..., dim / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimestepMLP(nn.Module):
    """Linear, SiLU, Linear: (..., in_dim) -> hidden width ``dim`` -> (..., out_dim), in the dtype of the weights."""

    def __init__(self, in_dim: int, dim: int, out_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.linear_1.weight.dtype)  # sinusoids are float32
        return self.linear_2(F.silu(self.linear_1(x)))


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
