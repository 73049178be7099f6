"""The Hydra Video mixer: one state-space scan that is bidirectional inside a frame and causal across frames.

Hydra (Hwang et al., arXiv 2407.09941) mixes a sequence in both directions. Here its backward direction ends at the end
of each frame: a token knows all of its own frame and of those before, and exactly nothing of later ones. What a video
has brought so far is a state of constant size.

Shapes: B batch, L tokens, D width, I = expand * D inner width, H heads of P channels, G groups of heads that share B
and C, N channels of the state, (t, h, w) grid, (kt, kh, kw) size of the convolution over K = I + 4 G N channels.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from blueberry_video.models.hydra_video.state_space import (
    NO_WEIGHT_DECAY,
    GatedRMSNorm,
    decay_rates,
    init_dt_bias,
    num_heads_of,
    step_sizes,
)
from blueberry_video.nn.blocks import DropPath
from blueberry_video.nn.feed_forward import Mlp
from blueberry_video.nn.patches import gather_tokens
from blueberry_video.ops import video_ssd


class Layout(NamedTuple):
    """Where the tokens of a batch stand in their videos."""

    grid: tuple[int, int, int]  # (t, h, w)
    keep: Tensor | None = None  # (B, L) long: the tokens' places in (t, h, w) raster, none twice; None: all in turn

    def spread(self, tokens: Tensor) -> Tensor:
        """(B, L, …) -> (B, t h w, …), zeros where no token is."""
        return tokens if self.keep is None else _scatter(tokens, self.keep, math.prod(self.grid))

    def pick(self, places: Tensor) -> Tensor:
        """(B, t h w, …) -> (B, L, …)."""
        return places if self.keep is None else gather_tokens(places, self.keep)


class MixerState(NamedTuple):
    """What a :class:`HydraVideoMixer` keeps of the frames it has seen; its size does not depend on their number."""

    scan: Tensor  # (B, H, P, N) behind the last frame, at least fp32; with a `block`, (B * blocks of a frame, H, P, N)
    conv: Tensor  # (B, kt - 1, h, w, K): what the last frames brought to the convolution; zeros before the first


class HydraVideoMixer(nn.Module):
    """Mixes the tokens of a video in linear time: in both directions inside a frame, only forward across frames.

    ``in_proj`` gives [z | x | B_f, C_f, B_b, C_b | dt_f, dt_b]; x and all B and C pass one depthwise 3-D convolution,
    causal in time, and SiLU. Unlike Hydra's, the decays and the bias of dt are each direction's own: forward a token
    must last for many frames, backward for one. The diagonal is δ_i = fc_D x_i + D, one number a head and token. Out
    comes out_proj(norm(y) · silu(z)), each token normed for itself.

    Args:
        dim: width D of the tokens.
        expand: inner width over ``dim``.
        head_dim: channels P of a head.
        state_dim: channels N of the state of each direction.
        num_groups: groups G of heads that share B and C.
        conv_size: frames, rows and columns (kt, kh, kw) that the convolution sees: the last kt frames, and as many rows
            and columns on either side; kh and kw odd.
        block: rows and columns of the blocks that a frame is cut into, each scanned for itself through time; ``None``
            is the whole frame, (1, 1) time alone.
        order: tokens of a frame come row by row (``"h"``) or column by column (``"w"``).
        dt_range: range in which each head's forward step begins, log-uniform; the backward ones begin in [0.001, 0.1].
            A head of step dt remembers about 1 / dt tokens.
        chunk: tokens that the scan takes at a time; ``None`` leaves it to the scan.

    Raises:
        ValueError: if ``head_dim`` does not divide ``expand * dim`` or ``num_groups`` the heads, for sizes below 1, an
            even kh or kw, an unknown ``order`` or an empty range.
    """

    no_weight_decay = NO_WEIGHT_DECAY

    def __init__(
        self,
        dim: int,
        expand: int = 2,
        head_dim: int = 64,
        state_dim: int = 128,
        num_groups: int = 1,
        conv_size: tuple[int, int, int] = (3, 3, 3),
        block: tuple[int, int] | None = None,
        order: str = "h",
        dt_range: tuple[float, float] = (1e-3, 0.1),
        chunk: int | None = None,
    ):
        super().__init__()
        if order not in ("h", "w"):
            raise ValueError(f"order={order!r} is unknown: choose 'h' (row by row) or 'w' (column by column).")
        if block is not None and (len(block) != 2 or min(block) < 1):
            raise ValueError(f"block={tuple(block)} is not (rows, columns) of 1 or more; None is the whole frame.")
        self.num_heads = num_heads_of(dim, expand, head_dim, num_groups)
        self.head_dim, self.state_dim, self.num_groups = head_dim, state_dim, num_groups
        self.block, self.order, self.chunk = block, order, chunk
        inner = expand * dim
        channels = inner + 4 * num_groups * state_dim
        self.in_proj = nn.Linear(dim, inner + channels + 2 * self.num_heads, bias=False)
        self.conv = CausalConv3d(channels, conv_size)
        self.A_log = nn.Parameter(torch.zeros(2, self.num_heads))  # forward, backward: A = -1
        dt_biases = (init_dt_bias(self.num_heads, *dt_range, dt_floor=dt_range[0]), init_dt_bias(self.num_heads))
        self.dt_bias = nn.Parameter(torch.stack(dt_biases))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.fc_D = nn.Linear(inner, self.num_heads, bias=False)
        self.norm = GatedRMSNorm(inner, norm_before_gate=True)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(
        self, x: Tensor, layout: Layout, state: MixerState | None = None, return_state: bool = False
    ) -> tuple[Tensor, MixerState | None]:
        """Mixes tokens.

        Args:
            x: (B, L, D).
            layout: where they stand. Dropped tokens leave zeros in the convolution and nothing in the scan.
            state: that behind earlier frames, which these continue; ``None`` begins anew.
            return_state: also give the state behind the last frame.

        Returns:
            (B, L, D), and the state or ``None``.

        Raises:
            ValueError: for a number of tokens that is not the layout's, a frame that the blocks do not tile, or a state
                of another batch or grid.
        """
        self._check(x, layout, state)
        (t, h, w), inner, shared = layout.grid, self.num_heads * self.head_dim, self.num_groups * self.state_dim
        z, xbc, dt = self.in_proj(x).split([inner, self.conv.channels, 2 * self.num_heads], dim=-1)
        dt = step_sizes(dt.unflatten(-1, (2, self.num_heads)), self.dt_bias)  # (B, L, 2, H)

        frames = layout.spread(xbc).unflatten(1, (t, h, w))
        seen = self.conv.extend(frames, None if state is None else state.conv)
        scan = _ScanOrder(layout, self.block, self.order)
        xbc, dt = scan.fold(F.silu(self.conv(seen)).flatten(1, 3)), scan.fold(layout.spread(dt))

        u, *both = xbc.split([inner, shared, shared, shared, shared], dim=-1)
        B_f, C_f, B_b, C_b = (rearrange(part, "b l (g n) -> b l g n", g=self.num_groups) for part in both)
        (dt_f, dt_b), (A_f, A_b) = dt.unbind(2), decay_rates(self.A_log)
        y, states = video_ssd(
            rearrange(u, "b l (h p) -> b l h p", h=self.num_heads),
            dt_f,
            dt_b,
            A_f,
            A_b,
            B_f,
            C_f,
            B_b,
            C_b,
            F.linear(u, self.fc_D.weight, self.D),  # the diagonal (B, L, H)
            segment_len=scan.segment_len,
            h0=None if state is None else state.scan,
            chunk=self.chunk,
            return_frame_states=True,
            max_segment=scan.max_segment,
        )
        y = self.out_proj(self.norm(layout.pick(scan.unfold(y.flatten(2))), z))
        # Copies: a view would keep what all frames brought, and the states behind all of them
        return y, MixerState(states[:, -1].clone(), seen[:, t:].clone()) if return_state else None

    def _check(self, x: Tensor, layout: Layout, state: MixerState | None) -> None:
        (t, h, w), keep = layout
        tokens = t * h * w if keep is None else keep.shape[1]
        if x.shape[1] != tokens:
            what = f"{t} x {h} x {w} tokens" if keep is None else f"{tokens} kept tokens"
            raise ValueError(f"x has {x.shape[1]} tokens, but its layout {what}: give x and the layout of one video.")
        bh, bw = self.block or (h, w)
        if h % bh or w % bw:
            raise ValueError(
                f"blocks of {bh} x {bw} tokens do not tile a frame of {h} x {w}: choose divisors of these."
            )
        if state is None:
            return
        blocks = len(x) * (h // bh) * (w // bw)
        scan = (blocks, self.num_heads, self.head_dim, self.state_dim)
        conv = (len(x), self.conv.size[0] - 1, h, w, self.conv.channels)
        given = (tuple(state.scan.shape), tuple(state.conv.shape))
        if given != (scan, conv):
            raise ValueError(
                f"the state has shapes {given} and should have {(scan, conv)}: pass the state that this layer gave for "
                "the frames before these, of the same batch."
            )


class CausalConv3d(nn.Module):
    """Depthwise convolution of (B, t, h, w, C) over the last frames and on both sides in the frame, zeros around.

    Summed over frames of 2-D convolutions: their backward pass is several times faster than that of a 3-D one.

    Args:
        channels: C.
        size: frames, rows and columns (kt, kh, kw); kh and kw odd.

    Raises:
        ValueError: for other sizes.
    """

    def __init__(self, channels: int, size: tuple[int, int, int]):
        super().__init__()
        if len(size) != 3 or min(size) < 1 or not (size[1] % 2 and size[2] % 2):
            raise ValueError(
                f"conv_size={tuple(size)} is not (frames, rows, columns) of 1 or more, the last two odd: a symmetric "
                "convolution has a middle. Choose for example (3, 3, 3)."
            )
        self.channels, self.size = channels, (size[0], size[1], size[2])
        bound = 1 / math.sqrt(math.prod(size))  # as torch begins a convolution
        self.weight = nn.Parameter(torch.empty(channels, 1, *size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def extend(self, frames: Tensor, history: Tensor | None) -> Tensor:
        """(B, t, h, w, C) and the kt - 1 frames before them, zeros if ``None`` -> (B, kt - 1 + t, h, w, C)."""
        if history is None:
            history = frames.new_zeros(frames.shape[0], self.size[0] - 1, *frames.shape[2:])
        return torch.cat([history, frames], dim=1)

    def forward(self, seen: Tensor) -> Tensor:
        """(B, kt - 1 + t, h, w, C) -> (B, t, h, w, C)."""
        (kt, kh, kw), t = self.size, seen.shape[1] - self.size[0] + 1
        total: Tensor = self.bias
        for frame in range(kt):
            images = rearrange(seen[:, frame : frame + t], "b t h w c -> (b t) h w c").permute(0, 3, 1, 2)
            taps = self.weight[:, :, frame]
            part = F.conv2d(images, taps, padding=(kh // 2, kw // 2), groups=self.channels)
            total = total + part.permute(0, 2, 3, 1)
        return total.to(part.dtype).unflatten(0, (-1, t))  # under autocast the bias is wider than the rest


class HydraVideoBlock(nn.Module):
    """Pre-norm block: the mixer and, unless ``mlp_ratio`` is 0, an MLP, each behind a LayerNorm and added to its input.

    Arguments of ``forward`` as those of the mixer.
    """

    def __init__(
        self, mixer: HydraVideoMixer, dim: int, mlp_ratio: float = 2.5, drop_path: float = 0.0, norm_eps: float = 1e-6
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
    """The order in which the tokens of a grid are scanned, and what the scan must know of it.

    Dropped tokens are left out of it, so that frames have different lengths. Blocks would also differ in their total:
    these keep every place of the grid, with a step of 0 where no token is, which neither decays nor feeds a state.
    """

    def __init__(self, layout: Layout, block: tuple[int, int] | None, order: str):
        (t, h, w), keep = layout
        bh, bw = block or (h, w)
        self.sizes = {"t": t, "nh": h // bh, "bh": bh, "nw": w // bw, "bw": bw}
        self.places = t * h * w
        self.inside = "bh bw" if order == "h" else "bw bh"
        self.segment_len: int | Tensor = bh * bw
        self.max_segment: int | None = None
        self.index: Tensor | None = None  # (B, L): the places of the tokens, one after the other
        if keep is not None and block is None:
            frame, place = keep // (h * w), keep % (h * w)
            rank = place if order == "h" else place % w * h + place // w
            self.index = keep.gather(1, (frame * (h * w) + rank).argsort(dim=1))
            lengths = torch.zeros(len(keep), t, dtype=torch.long, device=keep.device)
            self.segment_len = lengths.scatter_add_(1, frame, torch.ones_like(frame))
            self.max_segment = h * w

    def fold(self, places: Tensor) -> Tensor:
        """(B, t h w, …) -> (batch, tokens, …) of the scan."""
        if self.index is not None:
            return gather_tokens(places, self.index)
        pattern = f"b (t nh bh nw bw) ... -> (b nh nw) (t {self.inside}) ..."
        return rearrange(places, pattern, **self.sizes)

    def unfold(self, tokens: Tensor) -> Tensor:
        """The inverse of :meth:`fold`; zeros where no token is."""
        if self.index is not None:
            return _scatter(tokens, self.index, self.places)
        pattern = f"(b nh nw) (t {self.inside}) ... -> b (t nh bh nw bw) ..."
        return rearrange(tokens, pattern, **self.sizes)


def _scatter(tokens: Tensor, index: Tensor, size: int) -> Tensor:
    """(B, L, …) at the places ``index`` (B, L) of (B, size, …), zeros elsewhere."""
    trailing = tokens.shape[2:]
    index = index.reshape(*index.shape, *[1] * len(trailing)).expand_as(tokens)
    return tokens.new_zeros(len(tokens), size, *trailing).scatter(1, index, tokens)
