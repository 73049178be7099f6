"""Temporal modules of Video Depth Anything (arXiv 2501.12375), and causal ones with a selective scan.

A module mixes the frames of a video at each pixel of a feature map separately, and adds the result to the map. Its last
layer starts at zero, so that at initialization it returns its input. Parameter names are those of the original code
(github.com/DepthAnything/Video-Depth-Anything, after AnimateDiff).

Shapes: B videos of T frames, maps of h x w pixels with C channels, N = B h w pixels. For the scan: H heads of P
channels, S channels of the state.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from blueberry_video.nn.positions import PositionTables, sinusoid_table
from blueberry_video.ops import ssd, ssd_step

WINDOW = 32  # frames that the attention sees at once: the length of its position table
RECENT = 29  # frames directly before the current one that it attends to, in addition to frame 0 and the oldest one
CACHED = 42  # frame 0 and the last 41 frames, of which the oldest is (22 + 22) - 1 - 2 frames back, as in two windows

State = tuple[Tensor, ...]


class Mixer(nn.Module, ABC):
    """Base class of layers that mix the frames of each pixel: at once, (N, T, C) -> (N, T, C), or frame by frame.

    Attributes:
        num_states: tensors of the state.
    """

    num_states: int

    @abstractmethod
    def step(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Processes the next frame (N, C), after the state of the preceding one, ``None`` before the first."""


class TemporalModule(nn.Module):
    """Residual module of feature maps: GroupNorm of each frame, linear layer, block over time, linear layer.

    Args:
        channels: C.
        mixers: layers over time of the block.
        norm_groups: groups of the GroupNorm, a divisor of C; 32 in the original.

    Attributes:
        num_states: tensors of the state.

    Raises:
        ValueError: ``norm_groups`` does not divide C; in ``step``, the state has different shapes.
    """

    def __init__(self, channels: int, mixers: Sequence[Mixer], norm_groups: int = 32):
        super().__init__()
        if norm_groups < 1 or channels % norm_groups:
            raise ValueError(f"norm_groups={norm_groups} must divide the {channels} channels of a temporal module.")
        inner: Any = nn.Module()
        inner.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        inner.proj_in = nn.Linear(channels, channels)
        inner.transformer_blocks = nn.ModuleList([TemporalBlock(channels, mixers)])
        inner.proj_out = nn.Linear(channels, channels)
        nn.init.zeros_(inner.proj_out.weight)
        nn.init.zeros_(inner.proj_out.bias)
        self.temporal_transformer = inner
        self.num_states: int = inner.transformer_blocks[0].num_states

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Maps (B T, C, h, w) of videos of T = ``frames`` frames -> the same shape."""
        size = {"t": frames, "h": x.shape[2], "w": x.shape[3]}
        pixels = rearrange(self._enter(x), "(b t) h w c -> (b h w) t c", **size)
        pixels = self.temporal_transformer.transformer_blocks[0](pixels)
        return x + self._leave(rearrange(pixels, "(b h w) t c -> (b t) h w c", **size))

    def step(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Maps (B, C, h, w) of the next frame, and the state after it."""
        pixels = rearrange(self._enter(x), "b h w c -> (b h w) c")
        pixels, state = self.temporal_transformer.transformer_blocks[0].step(pixels, state)
        return x + self._leave(rearrange(pixels, "(b h w) c -> b h w c", h=x.shape[2], w=x.shape[3])), state

    def _enter(self, x: Tensor) -> Tensor:
        """(n, C, h, w) -> (n, h, w, C)."""
        inner = self.temporal_transformer
        # three dimensions: on the CPU the backward pass of GroupNorm crashes for channels-last maps without gradients
        normed = inner.norm(x.flatten(2).contiguous()).unflatten(2, x.shape[2:])
        return inner.proj_in(normed.permute(0, 2, 3, 1))

    def _leave(self, x: Tensor) -> Tensor:
        """(n, h, w, C) -> (n, C, h, w)."""
        return self.temporal_transformer.proj_out(x).permute(0, 3, 1, 2)


class TemporalBlock(nn.Module):
    """Pre-norm block: mixers over time, then a GEGLU of 4 times the width, each with a residual. (N, T, C) -> same."""

    def __init__(self, dim: int, mixers: Sequence[Mixer]):
        super().__init__()
        self.attention_blocks = nn.ModuleList(mixers)  # name of the original, also for scans
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in mixers)
        self.ff = GEGLU(dim, 4 * dim)
        self.ff_norm = nn.LayerNorm(dim)
        self.num_states = sum(mixer.num_states for mixer in mixers)

    def mixers(self) -> Iterator[tuple[Mixer, nn.Module]]:
        """Yields each mixer and its norm."""
        return zip(cast(Iterator[Mixer], self.attention_blocks), self.norms)

    def forward(self, x: Tensor) -> Tensor:
        for mixer, norm in self.mixers():
            x = x + mixer(norm(x))
        return x + self.ff(self.ff_norm(x))

    def step(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        after: list[Tensor] = []
        for mixer, norm in self.mixers():
            before = None if state is None else state[len(after) : len(after) + mixer.num_states]
            mixed, new = mixer.step(norm(x), before)
            x = x + mixed
            after += new
        return x + self.ff(self.ff_norm(x)), tuple(after)


class GEGLU(nn.Module):
    """Gated MLP (arXiv 2002.05202): the first half times GELU of the second half. (…, C) -> (…, C)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        first: Any = nn.Module()
        first.proj = nn.Linear(dim, 2 * hidden_dim)
        self.net: Any = nn.ModuleList([first, nn.Identity(), nn.Linear(hidden_dim, dim)])  # the second: dropout of 0

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.net[0].proj(x).chunk(2, dim=-1)
        return self.net[2](value * F.gelu(gate))


# ---- attention -------------------------------------------------------------------------------------------------------


class TemporalAttention(Mixer, PositionTables):
    """Self-attention over the frames of each pixel, in both directions of time, with absolute positions.

    In a stream, frame t attends to the cached inputs of frames 0, t - 41 and t - 29 … t - 1, at positions 0 … 30, and
    to itself at position 31. Frame 0 is processed alone; copies of its cache replace those of frames before it. The
    state is one tensor (N, 42, C): frame 0 and the last 41 frames. A stream is not equal to the window at once.

    Args:
        dim: C.
        num_heads: attention heads; 8 in the original.

    Raises:
        ValueError: ``num_heads`` does not divide C; in ``step``, the state has a different shape.
    """

    num_states = 1

    def __init__(self, dim: int, num_heads: int = 8):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"temporal_heads={num_heads} must divide the {dim} channels of a temporal module.")
        self.dim, self.num_heads = dim, num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.register_tables()

    def tables(self) -> dict[str, Tensor]:
        return {"pe": sinusoid_table(WINDOW, self.dim)[None]}

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) with T up to 32 -> (N, T, C)."""
        x = self._with_positions(x)
        return self._attend(x, x)

    def step(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """(N, C) and the cache (N, 42, C) -> (N, C) and the next cache."""
        frame = x[:, None]
        if state is None:
            return self(frame)[:, 0], (frame.repeat(1, CACHED, 1),)
        (cache,) = state
        _check_state(cache, (len(x), CACHED, x.shape[1]))
        context = self._with_positions(torch.cat([cache[:, :2], cache[:, -RECENT:], frame], dim=1))
        return self._attend(context[:, -1:], context)[:, 0], (torch.cat([cache[:, :1], cache[:, 2:], frame], dim=1),)

    def _with_positions(self, x: Tensor) -> Tensor:
        return x + self.get_buffer("pe")[:, : x.shape[1]].to(x.dtype)

    def _attend(self, queries: Tensor, context: Tensor) -> Tensor:
        """(N, n, C) and (N, m, C) -> (N, n, C)."""
        projected = self.to_q(queries), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(x, "b t (heads c) -> b heads t c", heads=self.num_heads) for x in projected)
        return self.to_out[0](rearrange(F.scaled_dot_product_attention(q, k, v), "b heads t c -> b t (heads c)"))


# ---- scan ------------------------------------------------------------------------------------------------------------


class TemporalScan(Mixer):
    """Causal selective scan over the frames of each pixel, gated, after a causal convolution over K frames.

    The output of a head is an average of the values of all frames up to the current one, weighted by dt and its decay:
    a scan, divided by the same scan of ones. So slow heads average all frames from the start, and a still video has the
    same output in every frame. The inputs of the scan (values, B, C and steps dt) pass the convolution, so that a step
    can depend on the change of a pixel; frames before the first are copies of the first. The state is three tensors:
    those of the two scans, (N, H, P, S) and (N, H, 1, 1), at least fp32, and the last inputs of the convolution
    (N, K - 1, …). A stream equals the scan at once.

    Args:
        dim: C.
        head_dim: P, a divisor of C.
        state_dim: S.
        conv_size: K.

    Raises:
        ValueError: ``head_dim`` does not divide C, or a size is below 1; in ``step``, the state has different shapes.
    """

    num_states = 3
    no_weight_decay = ("conv_weight",)  # 0 is not a neutral value
    least_step = 1e-3  # frames with a smaller weight would leave the average undefined

    def __init__(self, dim: int, head_dim: int = 16, state_dim: int = 16, conv_size: int = 3):
        super().__init__()
        if min(head_dim, state_dim, conv_size) < 1 or dim % head_dim:
            raise ValueError(
                f"scan_head_dim={head_dim} must divide the {dim} channels of a temporal module, and scan_state_dim="
                f"{state_dim} and scan_conv_size={conv_size} must be at least 1."
            )
        self.dim, self.num_heads, self.state_dim, self.conv_size = dim, dim // head_dim, state_dim, conv_size
        self.sizes = [dim, state_dim, state_dim, self.num_heads]  # values, B, C, dt
        self.in_proj = nn.Linear(dim, dim + sum(self.sizes), bias=False)  # the gate, then the inputs of the scan
        self.conv_weight = nn.Parameter(torch.zeros(conv_size, sum(self.sizes)))
        self.conv_bias = nn.Parameter(torch.zeros(sum(self.sizes)))
        self.A_log, self.D = nn.Parameter(torch.zeros(self.num_heads)), nn.Parameter(torch.ones(self.num_heads))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.out_proj = nn.Linear(dim, dim)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Starts as moving averages of the values, with the memories of the heads from 1 to 32 frames.

        With A = -1 and B · C near 1, a head with step dt averages about 1 / dt frames. Slow heads smooth the noise of
        single frames; fast heads, the skip D and the convolution, which starts as the identity, follow the current
        frame. The steps start independent of the input, and learn to depend on what a frame shows.
        """
        _, b, c, steps = self.conv_bias.split(self.sizes)
        # a single head must do both: it takes the geometric mean
        memory = torch.linspace(0, 1, self.num_heads) if self.num_heads > 1 else torch.tensor([0.5])
        dt = (1 / WINDOW) ** memory.to(steps.device) - self.least_step
        steps.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        b.fill_(self.state_dim**-0.5)
        c.fill_(self.state_dim**-0.5)
        self.conv_weight[-1].fill_(1.0)
        _, _, b, c, steps = self.in_proj.weight.split([self.dim, *self.sizes])
        b.mul_(self.state_dim**-0.5)
        c.mul_(self.state_dim**-0.5)
        steps.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, C)."""
        gate, inputs = self.in_proj(x).split([self.dim, sum(self.sizes)], dim=-1)
        history = inputs[:, :1].expand(-1, self.conv_size - 1, -1)
        u, B, C, dt = self._scanned(torch.cat([history, inputs], dim=1))
        sums, one = ssd(u, dt, self._decay(), B, C), torch.ones_like(dt[:, :, :1, None])
        weights = ssd(torch.ones_like(dt[..., None]), dt, self._decay(), one, one)
        assert isinstance(sums, Tensor)
        assert isinstance(weights, Tensor)
        return self._output(sums / weights, u, gate)

    def step(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """(N, C) and the states of the scans and of the convolution -> (N, C) and the next ones."""
        gate, inputs = self.in_proj(x).split([self.dim, sum(self.sizes)], dim=-1)
        if state is None:
            history = inputs[:, None].expand(-1, self.conv_size - 1, -1)
        else:
            sizes = (len(x), self.num_heads, self.dim // self.num_heads, self.state_dim)
            for tensor, shape in zip(
                state, (sizes, (*sizes[:2], 1, 1), (len(x), self.conv_size - 1, inputs.shape[1])), strict=True
            ):
                _check_state(tensor, shape)
            history = state[2]
        recent = torch.cat([history, inputs[:, None]], dim=1)
        u, B, C, dt = (each[:, 0] for each in self._scanned(recent))
        one = torch.ones_like(dt[:, :1, None])
        if state is None:
            empty = dt.new_zeros(len(x), self.num_heads, 1, 1)
            state = empty.expand(-1, -1, u.shape[2], self.state_dim), empty
        sums, scan = ssd_step(u, dt, self._decay(), B, C, None, state[0])
        weights, total = ssd_step(torch.ones_like(dt[..., None]), dt, self._decay(), one, one, None, state[1])
        # a view would keep all of `recent` in memory
        return self._output(sums / weights, u, gate), (scan, total, recent[:, 1:].clone())

    def _scanned(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs (N, K - 1 + T, …) -> values (N, T, H, P), B and C (N, T, 1, S), and dt (N, T, H), at least fp32."""
        frames = inputs.shape[1] - self.conv_size + 1
        mixed = self.conv_bias.to(inputs.dtype)
        for i, weight in enumerate(self.conv_weight.to(inputs.dtype)):
            mixed = mixed + weight * inputs[:, i : i + frames]
        u, B, C, dt = mixed.split(self.sizes, dim=-1)
        dt = F.softplus(dt.to(torch.promote_types(dt.dtype, torch.float32))) + self.least_step
        return u.unflatten(-1, (self.num_heads, -1)), B[:, :, None], C[:, :, None], dt

    def _decay(self) -> Tensor:
        """A (H,), below 0."""
        return -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()

    def _output(self, averages: Tensor, u: Tensor, gate: Tensor) -> Tensor:
        """Averages and values (…, H, P), and the gate (…, C) -> (…, C)."""
        y = averages + self.D[:, None] * u
        y = self.norm(y.flatten(-2).to(self.norm.weight.dtype))  # autocast does not cast the inputs of RMSNorm
        return self.out_proj(y * F.silu(gate))


def _check_state(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"a tensor of the state has shape {tuple(tensor.shape)}, expected {shape}: pass the state that step "
            "returned for the preceding frame, of the same batch and size."
        )
