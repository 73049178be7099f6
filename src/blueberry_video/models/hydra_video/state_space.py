"""What the state-space mixers share: sizes, the gated norm, step sizes and decays and how they begin."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NO_WEIGHT_DECAY = ("A_log", "D", "dt_bias")  # a mixer's `no_weight_decay`: 0 is no neutral value of theirs


class GatedRMSNorm(nn.Module):
    """RMS norm with a SiLU gate of its own: (..., dim) and a gate (..., dim) -> (..., dim), each token for itself.

    Computed in at least fp32. Mamba-2 gates and then norms, w · norm(x · silu(gate)); Hydra norms and then gates,
    w · norm(x) · silu(gate) (``RMSNormGated`` of state-spaces/mamba, whose parameter names these are).

    Args:
        dim: width of the tokens.
        eps: added to the mean square.
        norm_before_gate: the gate comes after the norm (Hydra), not before it (Mamba-2).
        num_groups: parts of the width that are normed each for itself; Mamba-2 norms each group of heads.

    Raises:
        ValueError: if ``num_groups`` does not divide ``dim``.
    """

    def __init__(self, dim: int, eps: float = 1e-5, norm_before_gate: bool = False, num_groups: int = 1):
        super().__init__()
        if num_groups < 1 or dim % num_groups:
            raise ValueError(f"num_groups={num_groups} does not divide the width {dim}: choose a divisor of {dim}.")
        self.eps, self.norm_before_gate, self.num_groups = eps, norm_before_gate, num_groups
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        dtype, opened = x.dtype, F.silu(_wide(gate))
        x = _wide(x) if self.norm_before_gate else _wide(x) * opened
        groups = x.unflatten(-1, (self.num_groups, -1))
        x = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)).flatten(-2) * self.weight
        return (x * opened if self.norm_before_gate else x).to(dtype)


def num_heads_of(dim: int, expand: int, head_dim: int, num_groups: int) -> int:
    """Heads of a mixer whose inner width is ``expand * dim``.

    Raises:
        ValueError: if ``head_dim`` does not divide that width, or ``num_groups`` the heads.
    """
    inner = expand * dim
    if min(inner, head_dim) < 1 or inner % head_dim:
        raise ValueError(
            f"head_dim={head_dim} does not divide the inner width expand * dim = {expand} * {dim} = {inner}: choose a "
            f"divisor of {inner}."
        )
    heads = inner // head_dim
    if num_groups < 1 or heads % num_groups:
        raise ValueError(
            f"num_groups={num_groups} does not divide the {heads} heads (expand * dim / head_dim = {inner} / "
            f"{head_dim}): the heads of a group share B and C, so choose a divisor of {heads}."
        )
    return heads


def step_sizes(dt: Tensor, bias: Tensor) -> Tensor:
    """Projected dt (..., H) and its bias (H) -> steps softplus(dt + bias) > 0, in at least fp32."""
    return F.softplus(_wide(dt) + _wide(bias))


def decay_rates(A_log: Tensor) -> Tensor:
    """A = -exp(A_log) < 0, in at least fp32: a token decays the state by exp(dt A)."""
    return -_wide(A_log).exp()


def init_dt_bias(num_heads: int, dt_min: float = 1e-3, dt_max: float = 0.1, dt_floor: float = 1e-4) -> Tensor:
    """Biases (H,) that make :func:`step_sizes` begin log-uniform in [dt_min, dt_max], and not below ``dt_floor``.

    A head of step dt and A = -1 remembers about 1 / dt tokens.

    Raises:
        ValueError: unless 0 < dt_min <= dt_max and dt_floor > 0.
    """
    if not (0 < dt_min <= dt_max and dt_floor > 0):
        raise ValueError(
            f"dt_min={dt_min}, dt_max={dt_max}, dt_floor={dt_floor}: steps are drawn log-uniform between the first two "
            "and raised to the third, so it takes 0 < dt_min <= dt_max and dt_floor > 0, such as 0.001, 0.1, 0.0001."
        )
    dt = torch.exp(torch.rand(num_heads) * math.log(dt_max / dt_min) + math.log(dt_min)).clamp(min=dt_floor)
    return dt + torch.log(-torch.expm1(-dt))  # softplus backwards, without overflow or cancellation


def init_A_log(num_heads: int, low: float = 1.0, high: float = 16.0) -> Tensor:
    """Logarithms (H,) of -A, uniform in [low, high]: Mamba-2's range; Hydra begins at 1 everywhere.

    Raises:
        ValueError: unless 0 < low <= high.
    """
    if not 0 < low <= high:
        raise ValueError(f"A is drawn from [{low}, {high}]: it takes 0 < low <= high, such as (1, 16).")
    return torch.log(torch.rand(num_heads) * (high - low) + low)


def _wide(x: Tensor) -> Tensor:
    """In fp32, or in fp64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
