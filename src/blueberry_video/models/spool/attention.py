"""Attention over the frames of a video in which a head looks either back or ahead, between two context frames: Spool's
(github.com/achalghoum/spool).

The sequence is a start frame, T frames of the video and an end frame. With f the number of a token's frame, from 0 to
T + 1, and reach R, a head that looks back lets a query see the keys with 0 <= f_q - f_k <= R, one that looks ahead
those with 0 <= f_k - f_q <= R. The context frames, 0 and T + 1, are exempt, in one of three modes:

- ``"both"``: every query sees both context frames, and their queries see everything;
- ``"split"``: heads that look back see the start frame, heads that look ahead the end frame; queries as above;
- ``"causal"``, for heads that look back alone: every query sees the start frame, which sees itself only, and the end
  frame is one more frame at the end. So no frame knows a later one, in any number of layers.

Shapes: B batch, H heads, T frames of S tokens, C tokens of a context frame, N = C + T S + C, P channels of a head.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from blueberry_video.nn.blocks import DropPath
from blueberry_video.nn.feed_forward import Mlp

MODES = ("both", "split", "causal")
MAX_QUERIES = 1024  # tokens that the banded path takes at a time: its masks have at most so many rows


class FrameLayout(NamedTuple):
    """What a sequence of N tokens consists of."""

    frames: int  # T
    tokens: int  # S, of a frame
    context: int  # C, of each context frame
    valid: Tensor | None = None  # (B, T, S) bool: which tokens there are, the others only fill up; None: all

    @property
    def sizes(self) -> list[int]:
        """Tokens of the start frame, the video and the end frame."""
        return [self.context, self.frames * self.tokens, self.context]


class Heads(NamedTuple):
    """Who looks where."""

    lookback: int  # the first so many of the heads look back, the others ahead
    reach: int  # R, in frames
    mode: str  # one of MODES


class Past(NamedTuple):
    """What an attention layer keeps of a stream: of the start frame and of the last R frames, and no more."""

    start: tuple[Tensor, Tensor]  # keys and values (B, H, C, P)
    recent: tuple[Tensor, Tensor]  # keys and values (B, H, up to R frames of S, P)


def frame_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: FrameLayout, heads: Heads, backend: str | None = None
) -> Tensor:
    """Softmax attention under the masks above.

    Args:
        q, k, v: (B, H, N, P).
        layout: what the N tokens are.
        heads: who looks where.
        backend: ``"banded"`` gathers for some frames at a time the keys in their reach, never makes a mask of N x N,
            and takes memory and time in proportion to T: the default on the CPU; ``"flex"`` is FlexAttention with a
            block mask, which skips what is masked: the default on CUDA; ``"reference"`` is the dense definition.

    Returns:
        (B, H, N, P); what stands at tokens that are not valid means nothing.

    Raises:
        ValueError: for an unknown backend, or another number of tokens than the layout's.
    """
    backend = backend or ("flex" if q.is_cuda else "banded")
    if q.shape[2] != sum(layout.sizes):
        raise ValueError(f"q has {q.shape[2]} tokens, but its layout {layout.sizes}: give the layout of this sequence.")
    if backend == "banded":
        return _banded(q, k, v, layout, heads)
    if backend == "flex":
        return _flex(q, k, v, layout, heads)
    if backend == "reference":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(layout, heads, q.shape[1], q.device))
    raise ValueError(f"backend={backend!r} is unknown: choose 'banded', 'flex' or 'reference'.")


def dense_mask(layout: FrameLayout, heads: Heads, num_heads: int, device: torch.device | None = None) -> Tensor:
    """The definition: which query sees which key, bool (1 or B, H, N, N)."""
    frame = _frame_numbers(layout, device)
    looks_back = torch.arange(num_heads, device=device)[:, None, None] < heads.lookback
    mask = _sees(frame[:, None], frame, looks_back, layout.frames + 1, heads)[None]
    there = _there(layout)
    return mask if there is None else mask & there


def _frame_numbers(layout: FrameLayout, device: torch.device | None) -> Tensor:
    """(N,): the number of each token's frame."""
    inside = torch.arange(layout.frames * layout.tokens, device=device) // max(layout.tokens, 1) + 1
    start = torch.zeros(layout.context, dtype=torch.long, device=device)
    return torch.cat([start, inside, start + layout.frames + 1])


def _there(layout: FrameLayout) -> Tensor | None:
    """``layout.valid`` as (B, 1, 1, N), where the tokens of the context frames are always there."""
    if layout.valid is None:
        return None
    return F.pad(layout.valid.flatten(1), (layout.context, layout.context), value=True)[:, None, None]


def _sees(query: Tensor, key: Tensor, looks_back: Tensor, last: int, heads: Heads) -> Tensor:
    """Whether a token of frame ``query`` sees one of frame ``key``, in a head of this kind; elementwise."""
    distance = torch.where(looks_back, query - key, key - query)
    near = (distance >= 0) & (distance <= heads.reach)
    if heads.mode == "causal":
        return near | (key == 0)
    everything = (query == 0) | (query == last)
    if heads.mode == "both":
        return near | everything | (key == 0) | (key == last)
    return near | everything | (key == torch.where(looks_back, 0, last))


# ---- FlexAttention ---------------------------------------------------------------------------------------------------


def _flex(q: Tensor, k: Tensor, v: Tensor, layout: FrameLayout, heads: Heads) -> Tensor:
    if layout.valid is None:
        mask = _block_mask(layout, heads, q.shape[1], q.device)
    else:
        mask = _build_block_mask(layout, heads, q.shape[1], q.device)
    attend = flex_attention if not q.is_cuda or torch.compiler.is_compiling() else _compiled_flex()
    return attend(q, k, v, block_mask=mask)


@lru_cache(maxsize=1)
def _compiled_flex():
    return torch.compile(flex_attention)  # uncompiled, it would compute all scores


def _build_block_mask(layout: FrameLayout, heads: Heads, num_heads: int, device: torch.device) -> BlockMask:
    with torch.inference_mode(False):  # a mask made in validation must serve training, too
        frame = _frame_numbers(layout, device)
        valid = _there(layout)
        length = len(frame)

        def mask_mod(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
            seen = _sees(frame[q_index], frame[k_index], h < heads.lookback, layout.frames + 1, heads)
            return seen if valid is None else seen & valid[b, 0, 0, k_index]

        batch = None if valid is None else len(valid)
        compiled = device.type == "cuda"  # else it makes all of N x N on the way
        return create_block_mask(mask_mod, batch, num_heads, length, length, device, _compile=compiled)


_block_mask = lru_cache(maxsize=32)(_build_block_mask)  # of layouts without `valid`, which is data


# ---- the banded path -------------------------------------------------------------------------------------------------


def _banded(q: Tensor, k: Tensor, v: Tensor, layout: FrameLayout, heads: Heads) -> Tensor:
    q_start, _, q_end = q.split(layout.sizes, dim=2)
    frames = [
        _one_way(q[:, part], k[:, part], v[:, part], layout, heads, looks_back)
        for part, looks_back in ((slice(None, heads.lookback), True), (slice(heads.lookback, None), False))
        if q[:, part].shape[1]
    ]
    attend, there = F.scaled_dot_product_attention, _there(layout)
    if heads.mode == "causal":
        k_start, v_start = k[:, :, : layout.context], v[:, :, : layout.context]
        start = attend(q_start, k_start, v_start)
        first = layout.context + max(layout.frames - heads.reach, 0) * layout.tokens  # the end frame sees from here on
        keys, values = torch.cat([k_start, k[:, :, first:]], dim=2), torch.cat([v_start, v[:, :, first:]], dim=2)
        if there is not None:
            there = torch.cat([there[..., : layout.context], there[..., first:]], dim=3)
        end = attend(q_end, keys, values, attn_mask=there)
    else:
        context = attend(torch.cat([q_start, q_end], dim=2), k, v, attn_mask=there)
        start, end = context.split([layout.context] * 2, dim=2)
    return torch.cat([start, torch.cat(frames, dim=1), end], dim=2)


def _one_way(q: Tensor, k: Tensor, v: Tensor, layout: FrameLayout, heads: Heads, looks_back: bool) -> Tensor:
    """What the tokens of the video, (B, H, T S, P), find in heads of one kind.

    Keys and values are split once into blocks of frames, and each block of queries gets those in its reach: slices of
    the whole would each get a gradient as long as the video, and the backward pass would be quadratic in T.
    """
    size = layout.tokens
    reach = min(heads.reach, max(layout.frames - 1, 0))
    step = min(max(math.ceil(reach / 2), 64 // max(size, 1), 1), max(MAX_QUERIES // max(size, 1), 1))
    behind = math.ceil(reach / step)  # blocks beside its own that a query sees
    queries = q.split(layout.sizes, dim=2)[1].split(step * size, dim=2)
    keys, values = (_ContextAndBlocks(x, layout, heads.mode, looks_back, step) for x in (k, v))
    valid = None if layout.valid is None else layout.valid.flatten(1).split(step * size, dim=1)
    out = []
    for i, query in enumerate(queries):
        blocks = range(max(i - behind, 0), i + 1) if looks_back else range(i, min(i + behind + 1, len(queries)))
        key, value = keys.gather(blocks), values.gather(blocks)
        extra = key.shape[2] - sum(queries[j].shape[2] for j in blocks)  # tokens of context frames
        shape = (query.shape[2] // size, (key.shape[2] - extra) // size, (i - blocks[0]) * step)
        mask = _band(*shape, heads.reach, looks_back, size, extra, q.device)
        if valid is not None:
            there = F.pad(torch.cat([valid[j] for j in blocks], dim=1), (extra, 0), value=True)[:, None, None]
            mask = there if mask is None else mask & there
        out.append(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
    return torch.cat(out, dim=2)


class _ContextAndBlocks:
    """Keys or values in blocks of ``step`` frames, behind those of the context frames that the heads see."""

    def __init__(self, x: Tensor, layout: FrameLayout, mode: str, looks_back: bool, step: int):
        start, frames, end = x.split(layout.sizes, dim=2)
        sees_both = mode == "both"
        self.context = ([start] if sees_both or looks_back else []) + ([end] if sees_both or not looks_back else [])
        self.blocks = frames.split(step * layout.tokens, dim=2)

    def gather(self, blocks: range) -> Tensor:
        return torch.cat([*self.context, *(self.blocks[j] for j in blocks)], dim=2)


def _band(
    queries: int, keys: int, offset: int, reach: int, looks_back: bool, tokens: int, context: int, device: torch.device
) -> Tensor | None:
    """bool (queries * S, context + keys * S): which tokens of these frames see which, and all see the context.

    The first query frame stands ``offset`` frames behind the first key frame. ``None`` if all see all.
    """
    sign = 1 if looks_back else -1
    corners = [sign * (offset - keys + 1), sign * (offset + queries - 1)]  # the extreme distances
    if min(corners) >= 0 and max(corners) <= reach:
        return None
    make = _make_band if torch.compiler.is_compiling() else _made_band
    return make(queries, keys, sign * offset, reach, sign, tokens, context, device)


def _make_band(
    queries: int, keys: int, offset: int, reach: int, sign: int, tokens: int, context: int, device: torch.device
) -> Tensor:
    distance = offset + sign * (torch.arange(queries)[:, None] - torch.arange(keys))
    near = (distance >= 0) & (distance <= reach)
    near = near.repeat_interleave(tokens, dim=0).repeat_interleave(tokens, dim=1)
    return F.pad(near, (context, 0), value=True).to(device)


@lru_cache(maxsize=64)
def _made_band(
    queries: int, keys: int, offset: int, reach: int, sign: int, tokens: int, context: int, device: torch.device
) -> Tensor:
    with torch.inference_mode(False):  # a mask made in validation must serve training, too
        return _make_band(queries, keys, offset, reach, sign, tokens, context, device)


# ---- layers ----------------------------------------------------------------------------------------------------------


def check_heads(
    dim: int, num_heads: int, num_lookback_heads: int, num_lookahead_heads: int, reach: int, mode: str
) -> None:
    """Refuses what no :class:`FrameAttention` can be built from.

    Raises:
        ValueError: see there.
    """
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_attention_heads={num_heads} does not divide the width {dim}: choose a divisor of {dim}.")
    if mode not in MODES:
        raise ValueError(f"context_mode={mode!r} is unknown: choose one of {', '.join(map(repr, MODES))}.")
    if mode == "causal" and (num_lookback_heads, num_lookahead_heads) != (num_heads, 0):
        raise ValueError(
            f"context_mode=causal with num_lookback_heads={num_lookback_heads} and num_lookahead_heads="
            f"{num_lookahead_heads}: heads that look ahead see what has not come yet. Set num_lookback_heads="
            f"{num_heads} and num_lookahead_heads=0, or choose 'both' or 'split'."
        )
    if min(num_lookback_heads, num_lookahead_heads) < 0 or num_lookback_heads + num_lookahead_heads != num_heads:
        raise ValueError(
            f"num_lookback_heads={num_lookback_heads} and num_lookahead_heads={num_lookahead_heads} do not add up "
            f"to num_attention_heads={num_heads}: write for example num_lookback_heads={num_heads - num_heads // 2} "
            f"and num_lookahead_heads={num_heads // 2}."
        )
    if reach < 0:
        raise ValueError(f"local_frame_range={reach} is negative: 0 sees the own frame alone, 1 its neighbour, too.")


class FrameAttention(nn.Module):
    """Self-attention under the masks of this module, with a fused query-key-value projection. (B, N, D) -> (B, N, D).

    Args:
        dim: width D of the tokens.
        num_heads: number of heads; must divide ``dim``.
        num_lookback_heads, num_lookahead_heads: how many of them look back and ahead; they add up to ``num_heads``.
        reach: frames R that a head sees beside its own, 0 or more.
        mode: ``"both"``, ``"split"`` or ``"causal"``.

    Raises:
        ValueError: for heads that do not add up or do not divide the width, a negative reach, an unknown mode, or a
            causal one with heads that look ahead.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_lookback_heads: int,
        num_lookahead_heads: int,
        reach: int,
        mode: str = "both",
    ):
        super().__init__()
        check_heads(dim, num_heads, num_lookback_heads, num_lookahead_heads, reach, mode)
        self.num_heads, self.heads = num_heads, Heads(num_lookback_heads, reach, mode)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: FrameLayout) -> Tensor:
        q, k, v = self._split(x)
        return self._merge(frame_attention(q, k, v, layout, self.heads))

    def extend(self, x: Tensor, tokens: int, past: Past | None) -> tuple[Tensor, Past]:
        """The next frames of a stream, in mode ``"causal"``: what :meth:`forward` gives for them, and the new past.

        Args:
            x: (B, n * S, D), n frames; without a past, the start frame.
            tokens: S.
            past: what the call before gave.
        """
        q, k, v = self._split(x)
        if past is None:
            out, nothing = F.scaled_dot_product_attention(q, k, v), k.new_empty(*k.shape[:2], 0, k.shape[3])
            return self._merge(out), Past((k.clone(), v.clone()), (nothing, nothing))
        (k_start, v_start), (k_past, v_past) = past
        k, v = torch.cat([k_past, k], dim=2), torch.cat([v_past, v], dim=2)
        new, all_frames = x.shape[1] // tokens, k.shape[2] // tokens
        mask = _band(new, all_frames, all_frames - new, self.heads.reach, True, tokens, k_start.shape[2], x.device)
        keys, values = torch.cat([k_start, k], dim=2), torch.cat([v_start, v], dim=2)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        first = max(all_frames - self.heads.reach, 0) * tokens
        # Copies: a view would keep the frames before, too
        return self._merge(out), Past(past.start, (k[:, :, first:].clone(), v[:, :, first:].clone()))

    def _split(self, x: Tensor) -> list[Tensor]:
        return [rearrange(part, "b n (h p) -> b h n p", h=self.num_heads) for part in self.qkv(x).chunk(3, dim=-1)]

    def _merge(self, out: Tensor) -> Tensor:
        return self.proj(rearrange(out, "b h n p -> b n (h p)"))


class FrameBlock(nn.Module):
    """Pre-norm block: :class:`FrameAttention` and an MLP, each behind a LayerNorm and added to its input."""

    def __init__(
        self, attn: FrameAttention, dim: int, mlp_ratio: float = 4.0, drop_path: float = 0.0, norm_eps: float = 1e-6
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, layout: FrameLayout, past: Past | None = None, streaming: bool = False
    ) -> tuple[Tensor, Past | None]:
        """(B, N, D) -> the same and ``None``; streaming, the next frames, see :meth:`FrameAttention.extend`."""
        seen, present = self.norm1(x), None
        if streaming:
            mixed, present = self.attn.extend(seen, layout.tokens, past)
        else:
            mixed = self.attn(seen, layout)
        x = x + self.drop_path(mixed)
        return x + self.drop_path(self.mlp(self.norm2(x))), present
