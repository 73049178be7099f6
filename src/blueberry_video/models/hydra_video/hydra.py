"""Hydra layer (Hwang et al., arXiv 2407.09941; ``Hydra`` of goombalab/hydra, with its parameter names)."""

from typing import Literal

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
from blueberry_video.parallel.scan import bidirectional_ssd
from blueberry_video.parallel.sequence import SequenceGroup


class HydraMixer(StateSpaceMixer):
    """Bidirectional token mixer: the sum of a forward scan, a backward scan and a diagonal, a quasi-separable matrix.

    The convolution is symmetric. Both directions share x, the decays A and the bias of dt; B, C and dt are separate.
    Sizes: see :class:`~blueberry_video.models.hydra_video.state_space.StateSpaceMixer`.

    Args:
        conv_size: Tokens in the window of the convolution, centered on each token; odd.
        dt_range: Range of the initial step of each head, log-uniform.
        shift: ``"hydra"``, as published: token i reads the state of its neighbor with the neighbor's C, C_{i-1} forward
            and C_{i+1} backward. ``"strict"``, the formula of the paper: it reads that state, decayed, with its own C.

    Raises:
        ValueError: For sizes that do not divide, an even ``conv_size``, an unknown ``shift`` or an empty range; in
            ``forward`` if a state is passed or requested, since a bidirectional mixer has none.
    """

    def __init__(
        self,
        dim: int,
        expand: int = 2,
        head_dim: int = 64,
        state_dim: int = 64,
        num_groups: int = 1,
        conv_size: int = 7,
        dt_range: tuple[float, float] = (1e-3, 0.1),
        chunk: int | None = None,
        shift: Literal["hydra", "strict"] = "hydra",
    ):
        super().__init__(dim, expand, head_dim, state_dim, num_groups, chunk)
        if conv_size < 1 or conv_size % 2 == 0:
            raise ValueError(f"conv_size={conv_size} must be odd and positive, such as {max(conv_size, 0) + 1}.")
        if shift not in ("hydra", "strict"):
            raise ValueError(f"shift={shift!r} is unknown: choose 'hydra' (as published) or 'strict' (the paper's).")
        self.shift = shift
        self.conv1d = nn.Conv1d(self.channels, self.channels, conv_size, padding=conv_size // 2, groups=self.channels)
        self.A_log = nn.Parameter(init_A_log(self.num_heads, 1.0, 1.0))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.fc_D = nn.Linear(self.inner, self.num_heads, bias=False)
        self.dt_bias = nn.Parameter(init_dt_bias(self.num_heads, *dt_range))
        self.norm = GatedRMSNorm(self.inner, norm_before_gate=True)
        self.out_proj = nn.Linear(self.inner, dim, bias=False)

    def forward(
        self, x: Tensor, layout: Layout | None = None, state: MixerState | None = None, return_state: bool = False
    ) -> tuple[Tensor, None]:
        """Tokens (B, L, D) in raster order -> (B, L, D) and ``None``; of ``layout``, only ``group`` is used."""
        if state is not None or return_state:
            raise ValueError(
                "mixer='hydra' is bidirectional over all tokens and has no state, so it does not support streaming: "
                "use mixer='hydra_video' or 'mamba2'."
            )
        z, xbc, dt = self.project(x)
        dt, A = step_sizes(dt.unflatten(-1, (2, -1)), self.dt_bias), decay_rates(self.A_log).expand(2, -1)
        if layout is not None and layout.group is not None:
            return self.output(self._split_scan(layout.group, xbc, dt, A), z), None
        xbc = F.silu(self.conv1d(xbc.mT).mT)
        y, _ = self.scan(xbc, dt, A, segment_len=x.shape[1], shift=self.shift)
        return self.output(y, z), None

    def _split_scan(self, group: SequenceGroup, xbc: Tensor, dt: Tensor, A: Tensor) -> Tensor:
        """Convolution and scan of tokens that are split over a group."""
        conv, reach = self.conv1d, self.conv1d.kernel_size[0] // 2
        xbc = torch.cat([group.preceding(xbc, reach), xbc, group.following(xbc, reach)], dim=1)
        xbc = F.silu(F.conv1d(xbc.mT, conv.weight, conv.bias, groups=conv.groups).mT)
        x, B_f, C_f, B_b, C_b = self.heads(xbc)
        D = F.linear(xbc[..., : self.inner], self.fc_D.weight, self.D)
        forward, backward = (dt[:, :, 0], A[0], B_f, C_f), (dt[:, :, 1], A[1], B_b, C_b)
        return bidirectional_ssd(group, x, forward, backward, D, self.shift, self.chunk)
