"""Hydra's layer (Hwang et al., arXiv 2407.09941; goombalab/hydra, ``Hydra``), with the names of its parameters.

Shapes: B batch, L tokens, D width, H heads of P channels, G groups of heads that share B and C, N channels of a state.
"""

from typing import Literal

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
from blueberry_video.ops import video_ssd


class HydraMixer(nn.Module):
    """Mixes tokens in both directions, in linear time: a forward and a backward scan and a diagonal, as one matrix.

    ``in_proj`` gives [z | x | B_f, C_f, B_b, C_b | dt_f, dt_b]; x and all B and C pass one symmetric depthwise
    convolution and SiLU. Both directions share x, the decays A and the bias of dt, each has B, C and dt of its own. The
    diagonal is δ_i = fc_D x_i + D, one number a head and token. Out comes out_proj(norm(y) · silu(z)).

    Args:
        dim: width D of the tokens.
        expand: inner width over ``dim``.
        head_dim: channels P of a head.
        state_dim: channels N of the state of each direction.
        num_groups: groups G of heads that share B and C.
        conv_size: tokens that the convolution sees, the token itself in their middle; odd.
        dt_range: range in which each head's step begins, log-uniform.
        shift: ``"hydra"`` as published: token i reads its neighbour's state with the neighbour's C, C_{i-1} forward and
            C_{i+1} backward. ``"strict"``, the paper's formula: it reads what is left of that state with its own C.
        chunk: tokens that the scan takes at a time; ``None`` leaves it to the scan.

    Raises:
        ValueError: if ``head_dim`` does not divide ``expand * dim``, ``num_groups`` the heads, for an even
            ``conv_size``, an unknown ``shift`` or an empty range.
    """

    no_weight_decay = NO_WEIGHT_DECAY

    def __init__(
        self,
        dim: int,
        expand: int = 2,
        head_dim: int = 64,
        state_dim: int = 64,
        num_groups: int = 1,
        conv_size: int = 7,
        dt_range: tuple[float, float] = (1e-3, 0.1),
        shift: Literal["hydra", "strict"] = "hydra",
        chunk: int | None = None,
    ):
        super().__init__()
        if conv_size < 1 or conv_size % 2 == 0:
            raise ValueError(
                f"conv_size={conv_size} has no token in its middle: choose an odd size, such as "
                f"{max(conv_size, 0) + 1}."
            )
        if shift not in ("hydra", "strict"):
            raise ValueError(f"shift={shift!r} is unknown: choose 'hydra' (as published) or 'strict' (the paper's).")
        self.num_heads = num_heads_of(dim, expand, head_dim, num_groups)
        self.head_dim, self.state_dim, self.num_groups = head_dim, state_dim, num_groups
        self.shift, self.chunk = shift, chunk
        inner = expand * dim
        channels = inner + 4 * num_groups * state_dim
        self.in_proj = nn.Linear(dim, inner + channels + 2 * self.num_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, conv_size, padding=conv_size // 2, groups=channels)
        self.A_log = nn.Parameter(init_A_log(self.num_heads, 1.0, 1.0))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.fc_D = nn.Linear(inner, self.num_heads, bias=False)
        self.dt_bias = nn.Parameter(init_dt_bias(self.num_heads, *dt_range))
        self.norm = GatedRMSNorm(inner, norm_before_gate=True)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L, D) -> (B, L, D)."""
        inner, shared = self.num_heads * self.head_dim, self.num_groups * self.state_dim
        z, xbc, dt = self.in_proj(x).split([inner, self.conv1d.in_channels, 2 * self.num_heads], dim=-1)
        xbc = F.silu(self.conv1d(xbc.mT).mT)
        u, *both = xbc.split([inner, shared, shared, shared, shared], dim=-1)
        B_f, C_f, B_b, C_b = (rearrange(part, "b l (g n) -> b l g n", g=self.num_groups) for part in both)
        dt_f, dt_b = (step_sizes(part, self.dt_bias) for part in dt.chunk(2, dim=-1))
        A = decay_rates(self.A_log)
        y, _ = video_ssd(
            rearrange(u, "b l (h p) -> b l h p", h=self.num_heads),
            dt_f,
            dt_b,
            A,
            A,
            B_f,
            C_f,
            B_b,
            C_b,
            F.linear(u, self.fc_D.weight, self.D),  # the diagonal (B, L, H)
            segment_len=x.shape[1],
            chunk=self.chunk,
            shift=self.shift,
            return_frame_states=True,
        )
        return self.out_proj(self.norm(y.flatten(-2), z))
