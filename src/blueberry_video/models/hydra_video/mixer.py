"""Hydra Video mixer: one state-space scan that is bidirectional within a frame and causal across frames.

Hydra (Hwang et al., arXiv 2407.09941) mixes a sequence in both directions. Here the backward direction is restarted in
each frame: a token depends on all of its frame and on all earlier frames, and exactly not on later ones. The state
after a frame has constant size.

Shapes: B batch, L tokens, D width, H heads of P channels, N channels of the state, (t, h, w) grid, (kt, kh, kw) size of
the convolution over K channels.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from blueberry_video.models.hydra_video.chunks import Chunks, ScanCache
from blueberry_video.models.hydra_video.state_space import (
    GatedRMSNorm,
    Layout,
    MixerState,
    StateSpaceMixer,
    decay_rates,
    init_dt_bias,
    scatter_tokens,
    step_sizes,
)
from blueberry_video.nn.blocks import DropPath
from blueberry_video.nn.feed_forward import Mlp
from blueberry_video.nn.patches import gather_tokens
from blueberry_video.ops import ssd
from blueberry_video.parallel.scan import entering_state

ReturnState = bool | Literal["before_frames"]
FEW_TOKENS = 512  # up to which a product is faster than a convolution of one row and column, with equal results


class HydraVideoMixer(StateSpaceMixer):
    """Token mixer of a video: bidirectional within a frame, causal across frames.

    The convolution is 3-D and causal in time. Unlike in Hydra, the decays and the bias of dt are separate per
    direction: the forward memory spans many frames, the backward memory one.
    Sizes: see :class:`~blueberry_video.models.hydra_video.state_space.StateSpaceMixer`.

    Args:
        conv_size: Frames, rows and columns (kt, kh, kw) of the convolution's window: the last kt frames, and rows and
            columns centered on each token; kh and kw odd.
        dt_range: Range of the initial forward step of each head, log-uniform; [0.001, 0.1] for the backward steps. A
            head with step dt has a memory of about 1 / dt tokens.
        block: Rows and columns of the blocks of a frame that are scanned separately through time; ``None`` for the
            whole frame, (1, 1) for a scan over time alone.
        order: Scan order of the tokens of a frame: row by row (``"h"``) or column by column (``"w"``).

    Raises:
        ValueError: For sizes that do not divide or are below 1, an even kh or kw, an unknown ``order`` or an empty
            range.
    """

    def __init__(
        self,
        dim: int,
        expand: int = 2,
        head_dim: int = 64,
        state_dim: int = 128,
        num_groups: int = 1,
        conv_size: tuple[int, int, int] = (3, 3, 3),
        dt_range: tuple[float, float] = (1e-3, 0.1),
        chunk: int | None = None,
        block: tuple[int, int] | None = None,
        order: str = "h",
    ):
        super().__init__(dim, expand, head_dim, state_dim, num_groups, chunk)
        if order not in ("h", "w"):
            raise ValueError(f"order={order!r} is unknown: choose 'h' (row by row) or 'w' (column by column).")
        if block is not None and (len(block) != 2 or min(block) < 1):
            raise ValueError(
                f"block={tuple(block)} must be (rows, columns) of at least 1, or None for the whole frame."
            )
        self.block, self.order = block, order
        self.conv = CausalConv3d(self.channels, conv_size)
        self.A_log = nn.Parameter(torch.zeros(2, self.num_heads))  # forward, backward: A = -1
        dt_biases = (init_dt_bias(self.num_heads, *dt_range, dt_floor=dt_range[0]), init_dt_bias(self.num_heads))
        self.dt_bias = nn.Parameter(torch.stack(dt_biases))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.fc_D = nn.Linear(self.inner, self.num_heads, bias=False)
        self.norm = GatedRMSNorm(self.inner, norm_before_gate=True)
        self.out_proj = nn.Linear(self.inner, dim, bias=False)

    def forward(
        self, x: Tensor, layout: Layout, state: MixerState | None = None, return_state: ReturnState = False
    ) -> tuple[Tensor, MixerState | None]:
        """Mixes tokens.

        Args:
            x: (B, L, D).
            layout: Positions of the tokens. Dropped tokens are zeros in the convolution and have no effect in the scan.
            state: State after the preceding frames; ``None`` before the first.
            return_state: Also returns the state after the last frame; with ``"before_frames"`` the states before every
                frame, folded to a batch of B t single frames and differentiable.

        Returns:
            (B, L, D), and the state or ``None``.

        Raises:
            ValueError: For a number of tokens different from the layout's, a frame that the blocks do not tile, a state
                of a different batch or grid, or a state while the frames are split over processes.
        """
        self._check(x, layout, state)
        self.check_split(layout.group, state, return_state)
        t, h, w = layout.grid
        z, xbc, dt = self.project(x)
        dt = step_sizes(dt.unflatten(-1, (2, self.num_heads)), self.dt_bias)  # (B, L, 2, H)
        frames = layout.spread(xbc).unflatten(1, (t, h, w))
        history, h0 = (None, None) if state is None else (state.conv, state.scan)
        if layout.group is not None:
            history = layout.group.preceding(frames, self.conv.size[0] - 1)
        inputs = self.conv.extend(frames, history)
        order, A = _ScanOrder(layout, self.block, self.order), decay_rates(self.A_log)
        xbc, dt = order.fold(F.silu(self.conv(inputs)).flatten(1, 3)), order.fold(layout.spread(dt))
        if layout.group is not None:
            u, B, *_ = self.heads(xbc)
            h0 = entering_state(layout.group, u, dt[:, :, 0], A[0], B)
        y, states = self.scan(xbc, dt, A, segment_len=order.segment_len, h0=h0, max_segment=order.max_segment)
        y = self.output(layout.pick(order.unfold(y)), z)
        if return_state == "before_frames":
            return y, self._before_frames(states, inputs, state)
        # Copies: views would keep the inputs and states of all frames in memory
        return y, MixerState(states[:, -1].clone(), inputs[:, t:].clone()) if return_state else None

    def initial_state(self, batch: int, frame: tuple[int, int]) -> MixerState:
        """Returns the zero state of B videos with frames of (h, w) tokens, equal to ``state=None``."""
        (bh, bw), weight = self.block or frame, self.conv.weight
        blocks = batch * (frame[0] // bh) * (frame[1] // bw)
        wide = torch.promote_types(weight.dtype, torch.float32)
        scan = weight.new_zeros(blocks, self.num_heads, self.head_dim, self.state_dim, dtype=wide)
        return MixerState(scan, weight.new_zeros(batch, self.conv.size[0] - 1, *frame, self.channels))

    def check_chunks(self, chunks: Chunks) -> None:
        """Raises ``ValueError`` for chunks that :meth:`update_chunk` does not support, or column-by-column order."""
        if self.order != "h":
            raise ValueError(
                f"order={self.order!r} is not supported by the cached readout: use order='h', in which a chunk of "
                "tokens in raster order is contiguous in the scan."
            )
        chunks.check_block(self.block or chunks.frame)

    @torch.no_grad()
    def cache_frame(self, x: Tensor, chunks: Chunks, state: MixerState | None = None) -> tuple[Tensor, ScanCache]:
        """Mixes the tokens of one frame as :meth:`forward`, and caches what :meth:`update_chunk` reads.

        Args:
            x: (B, h w, D).
            chunks: Partition of the frame.
            state: State after the preceding frames; ``None`` before the first.

        Returns:
            (B, h w, D), and the cache: the forward state before the frame, the backward state that enters each chunk
            from the right, and the inputs of the convolution.

        Raises:
            ValueError: As in :meth:`forward` and :meth:`check_chunks`.
        """
        h, w = chunks.frame
        layout = Layout((1, h, w))
        self._check(x, layout, state)
        self.check_chunks(chunks)
        state = self.initial_state(len(x), (h, w)) if state is None else state
        z, xbc, dt = self.project(x)
        steps = step_sizes(dt.unflatten(-1, (2, self.num_heads)), self.dt_bias)
        inputs = self.conv.extend(xbc.unflatten(1, (1, h, w)), state.conv.to(xbc.dtype))
        order, A = _ScanOrder(layout, self.block, self.order), decay_rates(self.A_log)
        xbc, steps = order.fold(F.silu(self.conv(inputs)).flatten(1, 3)), order.fold(steps)
        y, _ = self.scan(xbc, steps, A, segment_len=order.segment_len, h0=state.scan)
        sizes = (len(x), order.sizes["nh"], order.sizes["nw"])
        cache = ScanCache(
            chunks,
            self.conv.pad(inputs),
            state.scan.unflatten(0, sizes).clone(),
            self._right_states(xbc, steps, A, chunks.tokens_in(self.block or (h, w))).unflatten(0, sizes),
        )
        return self.output(order.unfold(y), z), cache

    @torch.no_grad()
    def update_chunk(self, x: Tensor, index: int, cache: ScanCache, advance: bool = True) -> Tensor:
        """Mixes the tokens of one chunk, reading the cached state to its right and the running state to its left.

        With a convolution of spatial size 1 and all chunks before this one advanced, the output equals that of
        :meth:`forward` on the frame with these tokens replaced. A larger convolution makes tokens to the right of a
        chunk depend on it, which the cached state ignores: then the output is exact only if tokens do not change.

        Args:
            x: (B, q, D), tokens of the chunk in raster order.
            index: Index of the chunk.
            cache: Of :meth:`cache_frame`; its convolution inputs of the chunk are replaced in place.
            advance: Advances the running state of ``cache`` over the chunk, in place.

        Returns:
            (B, q, D).
        """
        rows, columns = cache.chunks.rectangle(index)
        size, block = cache.chunks.size, self.block or cache.chunks.frame
        z, xbc, dt = self.project(x)
        steps = step_sizes(dt.unflatten(-1, (2, self.num_heads)), self.dt_bias)
        _, kh, kw = self.conv.size
        window = cache.inputs[:, :, rows.start : rows.stop + kh - 1, columns.start : columns.stop + kw - 1]
        window[:, -1, kh // 2 : kh // 2 + size[0], kw // 2 : kw // 2 + size[1]] = xbc.unflatten(1, size)
        xbc = F.silu(self.conv(window, padded=True)).flatten(1, 3)
        order = _ScanOrder(Layout((1, *size)), (min(size[0], block[0]), min(size[1], block[1])), self.order)
        blocks = (slice(None), *cache.chunks.blocks(index, block))
        y, states = self.scan(
            order.fold(xbc),
            order.fold(steps),
            decay_rates(self.A_log),
            segment_len=order.segment_len,
            h0=cache.left[blocks].flatten(0, 2),
            g0=cache.right[(*blocks, cache.chunks.rank_in_block(index, block))].flatten(0, 2),
        )
        if advance:
            cache.left[blocks] = states[:, -1].unflatten(0, cache.left[blocks].shape[:3])
        return self.output(order.unfold(y), z)

    def _before_frames(self, states: Tensor, inputs: Tensor, state: MixerState | None) -> MixerState:
        """States (B blocks, t, H, P, N) after every frame and extended inputs -> states before every frame, folded."""
        batch, history = len(inputs), self.conv.size[0] - 1
        first = torch.zeros_like(states[:, 0]) if state is None else state.scan.to(states.dtype)
        scan = torch.cat([first[:, None], states[:, :-1]], dim=1)
        frames = torch.arange(scan.shape[1], device=inputs.device)[:, None]
        conv = inputs[:, frames + torch.arange(history, device=inputs.device)]  # (B, t, kt - 1, h, w, channels)
        return MixerState(rearrange(scan, "(b n) t ... -> (b t n) ...", b=batch), conv.flatten(0, 1))

    def _right_states(self, xbc: Tensor, steps: Tensor, A: Tensor, length: int) -> Tensor:
        """Backward states (batch, parts, H, P, N) that enter each part of ``length`` tokens of a sequence from the
        right."""
        x, _, _, B, C = (part.flip(1) for part in self.heads(xbc))
        dt = steps[:, :, 1].flip(1)
        _, states = ssd(x, dt, A[1], B, C, None, length, chunk=self.chunk, return_frame_states=True)
        return torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1).flip(1)

    def _check(self, x: Tensor, layout: Layout, state: MixerState | None) -> None:
        (t, h, w), keep, _ = layout
        tokens = t * h * w if keep is None else keep.shape[1]
        if x.shape[1] != tokens:
            expected = f"{t} x {h} x {w} tokens" if keep is None else f"{tokens} kept tokens"
            raise ValueError(f"x has {x.shape[1]} tokens, but its layout has {expected}: both must be of one video.")
        bh, bw = self.block or (h, w)
        if h % bh or w % bw:
            raise ValueError(
                f"blocks of {bh} x {bw} tokens do not tile a frame of {h} x {w}: choose divisors of these."
            )
        scan = (len(x) * (h // bh) * (w // bw), self.num_heads, self.head_dim, self.state_dim)
        self.check_state(state, scan, (len(x), self.conv.size[0] - 1, h, w, self.channels))


class CausalConv3d(nn.Module):
    """Depthwise convolution of (B, t, h, w, C), causal over frames and centered within a frame, with zero padding.

    Computed as a sum over frames of 2-D convolutions: their backward pass is several times faster than a 3-D one's.

    Args:
        channels: C.
        size: Frames, rows and columns (kt, kh, kw); kh and kw odd.

    Raises:
        ValueError: For other sizes.
    """

    def __init__(self, channels: int, size: tuple[int, int, int]):
        super().__init__()
        if len(size) != 3 or min(size) < 1 or not (size[1] % 2 and size[2] % 2):
            raise ValueError(
                f"conv_size={tuple(size)} must be (frames, rows, columns) of at least 1, with odd rows and columns, "
                "such as (3, 3, 3)."
            )
        self.channels, self.size = channels, (size[0], size[1], size[2])
        bound = 1 / math.sqrt(math.prod(size))  # the initialization of torch's convolutions
        self.weight = nn.Parameter(torch.empty(channels, 1, *size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def extend(self, frames: Tensor, history: Tensor | None) -> Tensor:
        """Prepends the last kt - 1 frames, zeros if ``None``: (B, t, h, w, C) -> (B, kt - 1 + t, h, w, C)."""
        if history is None:
            history = frames.new_zeros(frames.shape[0], self.size[0] - 1, *frames.shape[2:])
        return torch.cat([history, frames], dim=1)

    def pad(self, extended: Tensor) -> Tensor:
        """Pads rows and columns with zeros: (B, t, h, w, C) -> (B, t, kh - 1 + h, kw - 1 + w, C), always a copy."""
        _, kh, kw = self.size
        padding = (0, 0, kw // 2, kw // 2, kh // 2, kh // 2)
        return F.pad(extended, padding) if any(padding) else extended.clone()

    def forward(self, extended: Tensor, padded: bool = False) -> Tensor:
        """(B, kt - 1 + t, h, w, C) -> (B, t, h, w, C); ``padded`` inputs have kh - 1 more rows, kw - 1 more columns."""
        (kt, kh, kw), t = self.size, extended.shape[1] - self.size[0] + 1
        padding = (0, 0) if padded else (kh // 2, kw // 2)
        total: Tensor = self.bias
        for frame in range(kt):
            images = rearrange(extended[:, frame : frame + t], "b t h w c -> (b t) h w c")
            taps = self.weight[:, :, frame]
            if kh == kw == 1 and images[..., 0].numel() <= FEW_TOKENS:
                part = images * taps.flatten().to(images.dtype)
            else:
                images = images.permute(0, 3, 1, 2)
                part = F.conv2d(images, taps, padding=padding, groups=self.channels).permute(0, 2, 3, 1)
            total = total + part
        return total.to(part.dtype).unflatten(0, (-1, t))  # under autocast the bias has a higher precision


class HydraVideoBlock(nn.Module):
    """Pre-norm residual block: a token mixer and, unless ``mlp_ratio`` is 0, an MLP.

    The arguments of ``forward`` are those of the mixer.
    """

    def __init__(
        self, mixer: StateSpaceMixer, dim: int, mlp_ratio: float = 2.5, drop_path: float = 0.0, norm_eps: float = 1e-6
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps) if mlp_ratio else None
        self.mlp = Mlp(dim, round(dim * mlp_ratio)) if mlp_ratio else None
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, layout: Layout, state: MixerState | None = None, return_state: bool = False
    ) -> tuple[Tensor, MixerState | None]:
        mixed, state = self.mixer(self.norm1(x), layout, state, return_state)
        x = x + self.drop_path(mixed)
        if self.mlp is not None and self.norm2 is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x, state


class _ScanOrder:
    """Scan order of the tokens of a grid.

    Without blocks, dropped tokens are removed, so frames may differ in length. With blocks, the number of tokens would
    also differ between blocks: all positions of the grid are kept, and those without a token have a step of 0, which
    neither decays the state nor adds to it.
    """

    def __init__(self, layout: Layout, block: tuple[int, int] | None, order: str):
        (t, h, w), keep, _ = layout
        bh, bw = block or (h, w)
        self.sizes = {"t": t, "nh": h // bh, "bh": bh, "nw": w // bw, "bw": bw}
        self.positions = t * h * w
        self.inside = "bh bw" if order == "h" else "bw bh"
        self.segment_len: int | Tensor = bh * bw
        self.max_segment: int | None = None
        self.index: Tensor | None = None  # (B, L): positions of the tokens in scan order
        if keep is not None and block is None:
            frame, position = keep // (h * w), keep % (h * w)
            rank = position if order == "h" else position % w * h + position // w
            self.index = keep.gather(1, (frame * (h * w) + rank).argsort(dim=1))
            lengths = torch.zeros(len(keep), t, dtype=torch.long, device=keep.device)
            self.segment_len = lengths.scatter_add_(1, frame, torch.ones_like(frame))
            self.max_segment = h * w

    def fold(self, positions: Tensor) -> Tensor:
        """(B, t h w, …) -> (batch, tokens, …) of the scan."""
        if self.index is not None:
            return gather_tokens(positions, self.index)
        pattern = f"b (t nh bh nw bw) ... -> (b nh nw) (t {self.inside}) ..."
        return rearrange(positions, pattern, **self.sizes)

    def unfold(self, tokens: Tensor) -> Tensor:
        """Inverse of :meth:`fold`, with zeros at positions without a token."""
        if self.index is not None:
            return scatter_tokens(tokens, self.index, self.positions)
        pattern = f"(b nh nw) (t {self.inside}) ... -> b (t nh bh nw bw) ..."
        return rearrange(tokens, pattern, **self.sizes)
