"""Mamba-2 layer (Dao and Gu, arXiv 2405.21060; ``Mamba2`` of state-spaces/mamba, with its parameter names)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blueberry_video.models.hydra_video.state_space import (
    GatedRMSNorm,
    Layout,
    MixerState,
    StateSpaceMixer,
    decay_rates,
    init_A_log,
    init_dt_bias,
    step_sizes,
)
from blueberry_video.ops import ssd, ssd_step
from blueberry_video.parallel.scan import entering_state


class Mamba2Mixer(StateSpaceMixer):
    """Causal token mixer: a gated selective state space after a short causal convolution.

    Sizes: see :class:`~blueberry_video.models.hydra_video.state_space.StateSpaceMixer`; the norm is applied to each
    group of heads separately.

    Args:
        conv_size: Number K of tokens in the window of the convolution: the token and the K - 1 preceding ones.
        dt_range: Range of the initial step of each head, log-uniform.
        A_range: Range of the initial -A of each head, uniform.

    Raises:
        ValueError: For sizes that do not divide, ``conv_size`` below 1 or empty ranges; in ``forward`` and ``step`` for
            a state of different shapes.
    """

    directions = 1

    def __init__(
        self,
        dim: int,
        expand: int = 2,
        head_dim: int = 64,
        state_dim: int = 128,
        num_groups: int = 1,
        conv_size: int = 4,
        dt_range: tuple[float, float] = (1e-3, 0.1),
        chunk: int | None = None,
        A_range: tuple[float, float] = (1.0, 16.0),
    ):
        super().__init__(dim, expand, head_dim, state_dim, num_groups, chunk)
        if conv_size < 1:
            raise ValueError(f"conv_size={conv_size} must be at least 1.")
        self.conv1d = nn.Conv1d(self.channels, self.channels, conv_size, groups=self.channels)
        self.A_log = nn.Parameter(init_A_log(self.num_heads, *A_range))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.dt_bias = nn.Parameter(init_dt_bias(self.num_heads, *dt_range))
        self.norm = GatedRMSNorm(self.inner, norm_before_gate=False, num_groups=num_groups)
        self.out_proj = nn.Linear(self.inner, dim, bias=False)

    def forward(
        self, x: Tensor, layout: Layout | None = None, state: MixerState | None = None, return_state: bool = False
    ) -> tuple[Tensor, MixerState | None]:
        """Tokens (B, L, D) in raster order -> (B, L, D) and, with ``return_state``, the state after the last token.

        ``state`` is the state after the preceding tokens, ``None`` before the first; of ``layout``, only ``group`` is
        used.
        """
        group = None if layout is None else layout.group
        self.check_split(group, state, return_state)
        z, xbc, dt = self.project(x)
        if group is None:
            inputs = self._with_history(xbc, state)
        else:
            inputs = torch.cat([group.preceding(xbc, self.conv1d.kernel_size[0] - 1), xbc], dim=1)
        u, B, C = self.heads(F.silu(self.conv1d(inputs.mT).mT))
        steps, A, h0 = step_sizes(dt, self.dt_bias), decay_rates(self.A_log), None if state is None else state.scan
        if group is not None:
            h0 = entering_state(group, u, steps, A, B)
        y, states = ssd(u, steps, A, B, C, self.D, h0=h0, chunk=self.chunk, return_frame_states=True)
        if not return_state:
            return self.output(y, z), None
        recent = inputs[:, x.shape[1] :].clone()  # a view would keep all inputs in memory
        return self.output(y, z), MixerState(states[:, -1], recent)

    def step(self, x: Tensor, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        """:meth:`forward` of one token (B, D): returns (B, D) and the next state."""
        z, xbc, dt = self.project(x)
        inputs = self._with_history(xbc[:, None], state)  # (B, K, channels)
        u, B, C = self.heads(F.silu(self.conv1d(inputs.mT).mT[:, 0]))
        steps = step_sizes(dt, self.dt_bias)
        scan = steps.new_zeros(*u.shape, self.state_dim) if state is None else state.scan
        y, scan = ssd_step(u, steps, decay_rates(self.A_log), B, C, self.D, scan)
        return self.output(y, z), MixerState(scan, inputs[:, 1:])

    def _with_history(self, xbc: Tensor, state: MixerState | None) -> Tensor:
        """Prepends the last K - 1 inputs of the convolution, zeros before the first token: (B, K - 1 + L, channels)."""
        history = (len(xbc), self.conv1d.kernel_size[0] - 1, self.channels)
        self.check_state(state, (len(xbc), self.num_heads, self.head_dim, self.state_dim), history)
        return torch.cat([xbc.new_zeros(history) if state is None else state.conv, xbc], dim=1)
