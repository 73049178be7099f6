"""Timestep embedding of diffusion models: sinusoid (Ho et al., arXiv 2006.11239) and MLP."""

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
