"""Mamba-2's layer (Dao and Gu, arXiv 2405.21060; state-spaces/mamba, ``Mamba2``), with the names of its parameters.

Shapes: B batch, L tokens, D width, I = expand * D inner width, H heads of P channels, G groups of heads that share B
and C, N channels of the state, K the size of the convolution over I + 2 G N channels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from blueberry_video.models.hydra_video.state_space import (
    NO_WEIGHT_DECAY,
    GatedRMSNorm,
    decay_rates,
    init_A_log,
    init_dt_bias,
    num_heads_of,
    step_sizes,
)
from blueberry_video.ops import ssd, ssd_step


class Mamba2State(NamedTuple):
    """What a :class:`Mamba2Mixer` keeps of the tokens it has seen; its size does not depend on their number."""

    scan: Tensor  # (B, H, P, N)
    conv: Tensor  # (B, K - 1, I + 2 G N), what the last tokens brought to the convolution; zeros before the first


class Mamba2Mixer(nn.Module):
    """Mixes tokens causally, in linear time: a gated selective state space behind a short causal convolution.

    ``in_proj`` gives [z | x | B | C | dt]; x, B and C pass the convolution and SiLU; out comes
    out_proj(norm(scan(x) · silu(z))).

    Args:
        dim: width D of the tokens.
        expand: inner width over ``dim``.
        head_dim: channels P of a head.
        state_dim: channels N of the state.
        num_groups: groups G of heads that share B and C, and that the norm takes one by one.
        conv_size: tokens K that the convolution sees: the last K.
        A_range: range in which each head's -A begins, uniform.
        dt_range: range in which each head's step begins, log-uniform.
        chunk: tokens that the scan takes at a time; ``None`` leaves it to the scan.

    Raises:
        ValueError: if ``head_dim`` does not divide ``expand * dim``, ``num_groups`` the heads, or for empty ranges.
    """

    no_weight_decay = NO_WEIGHT_DECAY

    def __init__(
        self,
        dim: int,
        expand: int = 2,
        head_dim: int = 64,
        state_dim: int = 128,
        num_groups: int = 1,
        conv_size: int = 4,
        A_range: tuple[float, float] = (1.0, 16.0),
        dt_range: tuple[float, float] = (1e-3, 0.1),
        chunk: int | None = None,
    ):
        super().__init__()
        if conv_size < 1:
            raise ValueError(f"conv_size={conv_size}: the convolution sees at least the token itself, so 1 or more.")
        self.num_heads = num_heads_of(dim, expand, head_dim, num_groups)
        self.head_dim, self.state_dim, self.num_groups, self.chunk = head_dim, state_dim, num_groups, chunk
        inner, shared = expand * dim, num_groups * state_dim
        self.in_proj = nn.Linear(dim, 2 * inner + 2 * shared + self.num_heads, bias=False)
        self.conv1d = nn.Conv1d(inner + 2 * shared, inner + 2 * shared, conv_size, groups=inner + 2 * shared)
        self.A_log = nn.Parameter(init_A_log(self.num_heads, *A_range))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.dt_bias = nn.Parameter(init_dt_bias(self.num_heads, *dt_range))
        self.norm = GatedRMSNorm(inner, norm_before_gate=False, num_groups=num_groups)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(
        self, x: Tensor, state: Mamba2State | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, Mamba2State]:
        """Tokens (B, L, D) -> (B, L, D), and with ``return_state`` the state behind the last.

        ``state`` is that behind earlier tokens, which these continue; ``None`` begins anew.
        """
        z, xbc, dt = self._project(x)
        seen = torch.cat([self._history(xbc, state), xbc], dim=1)  # (B, K - 1 + L, channels)
        u, B, C = self._heads(F.silu(self.conv1d(seen.mT).mT))
        y, states = ssd(
            u,
            step_sizes(dt, self.dt_bias),
            decay_rates(self.A_log),
            B,
            C,
            self.D,
            h0=None if state is None else state.scan,
            chunk=self.chunk,
            return_frame_states=True,
        )
        out = self.out_proj(self.norm(y.flatten(-2), z))
        if not return_state:
            return out
        recent = seen[:, x.shape[1] :].clone()  # a view would keep all of them in memory
        return out, Mamba2State(states[:, -1], recent)

    def step(self, x: Tensor, state: Mamba2State | None = None) -> tuple[Tensor, Mamba2State]:
        """One token (B, D) and the state behind those before it -> what :meth:`forward` gives for it, and the state
        behind it; ``None`` for the first token."""
        z, xbc, dt = self._project(x)
        seen = torch.cat([self._history(xbc[:, None], state), xbc[:, None]], dim=1)  # (B, K, channels)
        u, B, C = self._heads(F.silu(self.conv1d(seen.mT).mT[:, 0]))
        steps = step_sizes(dt, self.dt_bias)
        scan = steps.new_zeros(*u.shape, self.state_dim) if state is None else state.scan
        y, scan = ssd_step(u, steps, decay_rates(self.A_log), B, C, self.D, scan)
        return self.out_proj(self.norm(y.flatten(-2), z)), Mamba2State(scan, seen[:, 1:])

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(…, D) -> the gate z (…, I), what the convolution takes (…, I + 2 G N) and dt (…, H)."""
        inner = self.num_heads * self.head_dim
        z, xbc, dt = self.in_proj(x).split([inner, self.conv1d.in_channels, self.num_heads], dim=-1)
        return z, xbc, dt

    def _history(self, xbc: Tensor, state: Mamba2State | None) -> Tensor:
        """What the convolution sees before the first of (B, L, channels): (B, K - 1, channels)."""
        if state is not None:
            return state.conv
        return xbc.new_zeros(xbc.shape[0], self.conv1d.kernel_size[0] - 1, xbc.shape[2])

    def _heads(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What comes out of the convolution -> x (…, H, P), B and C (…, G, N)."""
        shared = self.num_groups * self.state_dim
        x, B, C = xbc.split([self.num_heads * self.head_dim, shared, shared], dim=-1)
        return (
            rearrange(x, "... (h p) -> ... h p", h=self.num_heads),
            rearrange(B, "... (g n) -> ... g n", g=self.num_groups),
            rearrange(C, "... (g n) -> ... g n", g=self.num_groups),
        )
