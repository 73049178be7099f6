"""Parts that the state-space mixers share: base class, gated norm, step sizes, decays and their initialization.

Shapes: B batch, L tokens, D width, I = expand * D inner width, H heads of P channels, G groups of heads that share B
and C, N channels of the state of each direction.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blueberry_video.nn.patches import gather_tokens
from blueberry_video.ops import video_ssd
from blueberry_video.parallel.sequence import KEY, SequenceGroup


class Layout(NamedTuple):
    """Positions of the tokens of a batch in their videos.

    If the frames are split over a group, grid and positions are those of the frames of this process.
    """

    grid: tuple[int, int, int]  # (t, h, w)
    keep: Tensor | None = None  # (B, L) long: distinct positions of the tokens in (t, h, w) raster; None: all in order
    group: SequenceGroup | None = None  # processes that have the frames before and after

    def spread(self, tokens: Tensor) -> Tensor:
        """(B, L, …) -> (B, t h w, …), zeros at positions without a token."""
        return tokens if self.keep is None else scatter_tokens(tokens, self.keep, math.prod(self.grid))

    def pick(self, positions: Tensor) -> Tensor:
        """(B, t h w, …) -> (B, L, …)."""
        return positions if self.keep is None else gather_tokens(positions, self.keep)


class MixerState(NamedTuple):
    """State of a causal mixer after the last token; its size does not depend on the number of tokens."""

    scan: Tensor  # (B, H, P, N), at least fp32; of HydraVideoMixer with `block` (B * blocks of a frame, H, P, N)
    conv: Tensor  # last inputs of the convolution, zeros before the first: (B, K - 1, …)


class StateSpaceMixer(nn.Module):
    """Base class of the token mixers: out_proj(norm(scan(x), gate z)), in time linear in the number of tokens.

    ``in_proj`` returns [z | x | B, C per direction | dt per direction]; x, B and C pass a short depthwise convolution
    and SiLU before the scan. A subclass sets ``norm`` and ``out_proj``, with two directions also ``D`` and ``fc_D``,
    and implements ``forward(x, layout=None, state=None, return_state=False) -> (y, state)``.

    Args:
        dim: Width D of the tokens.
        expand: Ratio of the inner width to ``dim``.
        head_dim: Channels P of a head.
        state_dim: Channels N of the state of each direction.
        num_groups: Groups G of heads that share B and C.
        chunk: Tokens of a chunk of the scan; chosen by the scan if ``None``.

    Raises:
        ValueError: If ``head_dim`` does not divide ``expand * dim``, or ``num_groups`` the number of heads.
    """

    directions: int = 2
    no_weight_decay = ("A_log", "D", "dt_bias")  # 0 is not a neutral value of these
    gathered_in_float32 = True  # by FSDP: in 16 bits, rounded decays add up over the tokens
    D: nn.Parameter
    fc_D: nn.Linear
    norm: nn.Module
    out_proj: nn.Linear

    def __init__(self, dim: int, expand: int, head_dim: int, state_dim: int, num_groups: int, chunk: int | None):
        super().__init__()
        self.num_heads = num_heads_of(dim, expand, head_dim, num_groups)
        self.head_dim, self.state_dim, self.num_groups, self.chunk = head_dim, state_dim, num_groups, chunk
        self.inner = expand * dim
        self.channels = self.inner + 2 * self.directions * num_groups * state_dim  # of the convolution
        self.in_proj = nn.Linear(dim, self.inner + self.channels + self.directions * self.num_heads, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """(…, D) -> gate z (…, I), input of the convolution (…, channels) and dt (…, directions * H)."""
        return self.in_proj(x).split([self.inner, self.channels, self.directions * self.num_heads], dim=-1)

    def heads(self, xbc: Tensor) -> list[Tensor]:
        """Output of the convolution (…, channels) -> x (…, H, P), then B and C (…, G, N) of each direction."""
        shared = self.num_groups * self.state_dim
        x, *rest = xbc.split([self.inner, *[shared] * (2 * self.directions)], dim=-1)
        return [x.unflatten(-1, (self.num_heads, -1)), *(part.unflatten(-1, (self.num_groups, -1)) for part in rest)]

    def scan(self, xbc: Tensor, dt: Tensor, A: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Scan in both directions, with the diagonal δ_i = fc_D x_i + D, one number per head and token.

        Args:
            xbc: (B, L, channels).
            dt: (B, L, 2, H), of the forward and the backward direction.
            A: (2, H).
            options: Further arguments of :func:`~blueberry_video.ops.video_ssd`.

        Returns:
            y (B, L, H, P) and the states (B, T, H, P, N) at the end of each frame.
        """
        x, B_f, C_f, B_b, C_b = self.heads(xbc)
        D = F.linear(xbc[..., : self.inner], self.fc_D.weight, self.D)
        (dt_f, dt_b), (A_f, A_b) = dt.unbind(2), A
        options |= {"chunk": self.chunk, "return_frame_states": True}
        y, states = video_ssd(x, dt_f, dt_b, A_f, A_b, B_f, C_f, B_b, C_b, D, **options)
        return y, states

    def output(self, y: Tensor, z: Tensor) -> Tensor:
        """(…, H, P) and the gate (…, I) -> (…, D)."""
        return self.out_proj(self.norm(y.flatten(-2), z))

    def check_split(self, group: SequenceGroup | None, state: MixerState | None, return_state: Any) -> None:
        """Raises ``ValueError`` if a state is passed or requested while the frames are split over a group."""
        if group is not None and (state is not None or return_state):
            raise ValueError(
                f"a state cannot be passed or returned with {KEY}={group.size}, which splits the frames over "
                "processes: stream outside of sequence_parallel."
            )

    def check_state(self, state: MixerState | None, scan: tuple[int, ...], conv: tuple[int, ...]) -> None:
        if state is not None and (tuple(state.scan.shape), tuple(state.conv.shape)) != (scan, conv):
            raise ValueError(
                f"the state has shapes {tuple(state.scan.shape)} and {tuple(state.conv.shape)}, expected {scan} and "
                f"{conv}: pass the state that this layer returned for the preceding tokens of the same batch."
            )


class GatedRMSNorm(nn.Module):
    """RMS norm of each token with a SiLU gate: (..., dim) and a gate (..., dim) -> (..., dim), in at least fp32.

    Mamba-2 gates before the norm, w · norm(x · silu(gate)); Hydra after it, w · norm(x) · silu(gate). Same as
    ``RMSNormGated`` of state-spaces/mamba, with its parameter names.

    Args:
        dim: Width of the tokens.
        eps: Added to the mean square.
        norm_before_gate: Applies the gate after the norm (Hydra) instead of before it (Mamba-2).
        num_groups: Parts of the width that are normalized separately; Mamba-2 normalizes each group of heads.

    Raises:
        ValueError: If ``num_groups`` does not divide ``dim``.
    """

    def __init__(self, dim: int, eps: float = 1e-5, norm_before_gate: bool = False, num_groups: int = 1):
        super().__init__()
        if num_groups < 1 or dim % num_groups:
            raise ValueError(f"num_groups={num_groups} does not divide the width {dim}: choose a divisor of {dim}.")
        self.eps, self.norm_before_gate, self.num_groups = eps, norm_before_gate, num_groups
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        dtype, silu = x.dtype, F.silu(_wide(gate))
        x = _wide(x) if self.norm_before_gate else _wide(x) * silu
        groups = x.unflatten(-1, (self.num_groups, -1))
        x = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)).flatten(-2) * self.weight
        return (x * silu if self.norm_before_gate else x).to(dtype)


def num_heads_of(dim: int, expand: int, head_dim: int, num_groups: int) -> int:
    """Returns the number of heads of a mixer; raises ``ValueError`` as documented in :class:`StateSpaceMixer`."""
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


def init_dt_bias(num_heads: int, dt_min: float = 1e-3, dt_max: float = 0.1, dt_floor: float | None = None) -> Tensor:
    """Biases (H,) with initial :func:`step_sizes` log-uniform in [dt_min, dt_max], clamped to at least ``dt_floor``.

    ``dt_floor`` defaults to 1e-4 or ``dt_min``, whichever is smaller. A head with step dt and A = -1 has a memory of
    about 1 / dt tokens.

    Raises:
        ValueError: Unless 0 < dt_min <= dt_max and dt_floor > 0.
    """
    dt_floor = min(1e-4, dt_min) if dt_floor is None else dt_floor
    if not (0 < dt_min <= dt_max and dt_floor > 0):
        raise ValueError(
            f"dt_min={dt_min}, dt_max={dt_max}, dt_floor={dt_floor} must satisfy 0 < dt_min <= dt_max and dt_floor > 0,"
            " such as 0.001, 0.1, 0.0001: steps are log-uniform in [dt_min, dt_max], clamped to at least dt_floor."
        )
    dt = torch.exp(torch.rand(num_heads) * math.log(dt_max / dt_min) + math.log(dt_min)).clamp(min=dt_floor)
    return dt + torch.log(-torch.expm1(-dt))  # inverse of softplus, without overflow or cancellation


def init_A_log(num_heads: int, low: float = 1.0, high: float = 16.0) -> Tensor:
    """Logarithms (H,) of -A, with -A uniform in [low, high]: the default is Mamba-2's; Hydra starts at 1.

    Raises:
        ValueError: Unless 0 < low <= high.
    """
    if not 0 < low <= high:
        raise ValueError(f"the range of -A, [{low}, {high}], must satisfy 0 < low <= high, such as (1, 16).")
    return torch.log(torch.rand(num_heads) * (high - low) + low)


def scatter_tokens(tokens: Tensor, index: Tensor, size: int) -> Tensor:
    """Writes (B, L, …) to the positions ``index`` (B, L) of (B, size, …), with zeros elsewhere."""
    trailing = tokens.shape[2:]
    index = index.reshape(*index.shape, *[1] * len(trailing)).expand_as(tokens)
    return tokens.new_zeros(len(tokens), size, *trailing).scatter(1, index, tokens)


def _wide(x: Tensor) -> Tensor:
    """Casts to fp32 unless the precision is higher."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
