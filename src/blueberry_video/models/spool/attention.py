"""Frame-local attention of Spool with lookback and lookahead heads and two context frames
(github.com/achalghoum/spool).

The sequence is a start frame, T video frames and an end frame. With f the frame index of a token, from 0 to T + 1, and
reach R, a query attends to the keys with 0 <= f_q - f_k <= R in a lookback head, and with 0 <= f_k - f_q <= R in a
lookahead head. The context frames, 0 and T + 1, are exempt, in one of these modes:

- ``"both"``: every query attends to both context frames, and their queries attend to all tokens;
- ``"split"``: lookback heads attend to the start frame, lookahead heads to the end frame; queries as above;
- ``"causal"``, for lookback heads only: every query attends to the start frame, which attends to itself only, and the
  end frame is an ordinary last frame. No frame depends on a later one, for any number of layers;
- ``"original"``, the mask of the original code: lookahead heads exclude their own frame, 1 <= f_k - f_q <= R. In
  lookback heads every query attends to the end frame and to the last token of frame T, which is an off-by-one error of
  the original, and the queries of both attend to all tokens; in lookahead heads the same holds for the start frame
  alone. The other context frame is an ordinary frame in the respective heads.

Shapes: B batch, H heads, T frames of S tokens, C tokens of a context frame, N = C + T S + C, P channels of a head.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from blueberry_video.nn.blocks import DropPath
from blueberry_video.nn.feed_forward import Mlp
from blueberry_video.nn.joint_attention import attend

MODES = ("both", "split", "causal", "original")
MAX_QUERIES = 1024  # maximum query tokens, thus mask rows, per block of the banded backend


class FrameLayout(NamedTuple):
    """Layout of a sequence of N tokens."""

    frames: int  # T
    tokens: int  # S, per frame
    context: int  # C, per context frame
    valid: Tensor | None = None  # padding mask (B, T, S) bool, true at tokens; None: no padding

    @property
    def sizes(self) -> list[int]:
        """Number of tokens of the start frame, the video and the end frame."""
        return [self.context, self.frames * self.tokens, self.context]


class Heads(NamedTuple):
    """Attention pattern of the heads."""

    lookback: int  # number of lookback heads, which come first
    reach: int  # R, in frames
    mode: str  # one of MODES


class Past(NamedTuple):
    """KV cache of an attention layer while streaming: the start frame and the last R frames."""

    start: tuple[Tensor, Tensor]  # keys and values (B, H, C, P)
    recent: tuple[Tensor, Tensor]  # keys and values (B, H, up to R frames of S, P)


def frame_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: FrameLayout, heads: Heads, backend: str | None = None
) -> Tensor:
    """Softmax attention under the masks above.

    Args:
        q, k, v: (B, H, N, P).
        layout: layout of the N tokens.
        heads: attention pattern.
        backend: ``"banded"``, the default on the CPU, gathers the keys in reach of a block of frames, so that memory
            and time are linear in T; ``"flex"``, the default on CUDA, is FlexAttention with a block mask;
            ``"reference"`` is the dense definition.

    Returns:
        (B, H, N, P); the output at padding is undefined.

    Raises:
        ValueError: for an unknown backend, or a number of tokens that differs from the layout.
    """
    backend = backend or ("flex" if q.is_cuda else "banded")
    if q.shape[2] != sum(layout.sizes):
        raise ValueError(f"q has {q.shape[2]} tokens, but layout has {layout.sizes}: pass the layout of this sequence.")
    if backend == "banded":
        return _banded(q, k, v, layout, heads)
    if backend == "flex":
        return _flex(q, k, v, layout, heads)
    if backend == "reference":
        return attend(q, k, v, dense_mask(layout, heads, q.shape[1], q.device))
    raise ValueError(f"backend={backend!r} is unknown: choose 'banded', 'flex' or 'reference'.")


def dense_mask(layout: FrameLayout, heads: Heads, num_heads: int, device: torch.device | None = None) -> Tensor:
    """Dense attention mask that defines the pattern: bool (1 or B, H, queries N, keys N)."""
    frame = _frame_index(layout, device)
    is_lookback = torch.arange(num_heads, device=device)[:, None, None] < heads.lookback
    if heads.mode == "original":
        tail = torch.arange(len(frame), device=device) >= _tail(layout)
        mask = _attends_originally(frame[:, None], frame, tail[:, None], tail, is_lookback, heads.reach)[None]
    else:
        mask = _attends(frame[:, None], frame, is_lookback, layout.frames + 1, heads)[None]
    valid = _padding_mask(layout)
    return mask if valid is None else mask & valid


def _frame_index(layout: FrameLayout, device: torch.device | None) -> Tensor:
    """Frame index of each token, (N,)."""
    inside = torch.arange(layout.frames * layout.tokens, device=device) // max(layout.tokens, 1) + 1
    start = torch.zeros(layout.context, dtype=torch.long, device=device)
    return torch.cat([start, inside, start + layout.frames + 1])


def _padding_mask(layout: FrameLayout) -> Tensor | None:
    """``layout.valid`` as (B, 1, 1, N), true at all tokens of the context frames."""
    if layout.valid is None:
        return None
    return F.pad(layout.valid.flatten(1), (layout.context, layout.context), value=True)[:, None, None]


def _attends(query: Tensor, key: Tensor, is_lookback: Tensor, last: int, heads: Heads) -> Tensor:
    """Elementwise mask: true where a token of frame ``query`` attends to one of frame ``key``."""
    distance = torch.where(is_lookback, query - key, key - query)
    near = (distance >= 0) & (distance <= heads.reach)
    if heads.mode == "causal":
        return near | (key == 0)
    everything = (query == 0) | (query == last)
    if heads.mode == "both":
        return near | everything | (key == 0) | (key == last)
    return near | everything | (key == torch.where(is_lookback, 0, last))


def _tail(layout: FrameLayout) -> int:
    """Index of the last token of frame T, the first one that is global in lookback heads of mode ``"original"``."""
    return layout.context + layout.frames * layout.tokens - 1


def _attends_originally(
    query: Tensor, key: Tensor, query_tail: Tensor, key_tail: Tensor, is_lookback: Tensor, reach: int
) -> Tensor:
    """:func:`_attends` in mode ``"original"``; ``query_tail`` and ``key_tail`` are true from :func:`_tail` on."""
    distance = torch.where(is_lookback, query - key, key - query)
    near = (distance >= torch.where(is_lookback, 0, 1)) & (distance <= reach)
    return near | torch.where(is_lookback, query_tail | key_tail, (query == 0) | (key == 0))


# ---- FlexAttention ---------------------------------------------------------------------------------------------------


def _flex(q: Tensor, k: Tensor, v: Tensor, layout: FrameLayout, heads: Heads) -> Tensor:
    build = _cached_block_mask if layout.valid is None else _block_mask
    return attend(q, k, v, build(layout, heads, q.shape[1], q.device))


def _block_mask(layout: FrameLayout, heads: Heads, num_heads: int, device: torch.device) -> BlockMask:
    with torch.inference_mode(False):  # a mask cached during validation must also serve training
        frame, valid = _frame_index(layout, device), _padding_mask(layout)
        length, tail = len(frame), _tail(layout)

        def mask_mod(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
            query, key, is_lookback = frame[q_index], frame[k_index], h < heads.lookback
            if heads.mode == "original":
                mask = _attends_originally(query, key, q_index >= tail, k_index >= tail, is_lookback, heads.reach)
            else:
                mask = _attends(query, key, is_lookback, layout.frames + 1, heads)
            return mask if valid is None else mask & valid[b, 0, 0, k_index]

        batch = None if valid is None else len(valid)
        compiled = device.type == "cuda"  # eager mode builds the dense mask N x N
        return create_block_mask(mask_mod, batch, num_heads, length, length, device, _compile=compiled)


_cached_block_mask = lru_cache(maxsize=32)(_block_mask)  # only without `valid`, which is data


# ---- banded attention ------------------------------------------------------------------------------------------------


def _banded(q: Tensor, k: Tensor, v: Tensor, layout: FrameLayout, heads: Heads) -> Tensor:
    q_start, _, q_end = q.split(layout.sizes, dim=2)
    frames = [
        _one_way(q[:, part], k[:, part], v[:, part], layout, heads, is_lookback)
        for part, is_lookback in ((slice(None, heads.lookback), True), (slice(heads.lookback, None), False))
        if q[:, part].shape[1]
    ]
    valid = _padding_mask(layout)
    if heads.mode == "original":
        return _with_original_context(q, k, v, layout, heads, frames)
    if heads.mode == "causal":
        k_start, v_start = k[:, :, : layout.context], v[:, :, : layout.context]
        start = attend(q_start, k_start, v_start)
        first = layout.context + max(layout.frames - heads.reach, 0) * layout.tokens  # in reach of the end frame
        keys, values = torch.cat([k_start, k[:, :, first:]], dim=2), torch.cat([v_start, v[:, :, first:]], dim=2)
        if valid is not None:
            valid = torch.cat([valid[..., : layout.context], valid[..., first:]], dim=3)
        end = attend(q_end, keys, values, valid)
    else:
        context = attend(torch.cat([q_start, q_end], dim=2), k, v, valid)
        start, end = context.split([layout.context] * 2, dim=2)
    return torch.cat([start, torch.cat(frames, dim=1), end], dim=2)


def _with_original_context(
    q: Tensor, k: Tensor, v: Tensor, layout: FrameLayout, heads: Heads, frames: list[Tensor]
) -> Tensor:
    """Attention output in mode ``"original"``, from that of the video tokens in lookback and in lookahead heads."""
    valid, context, tail = _padding_mask(layout), layout.context, _tail(layout)
    out = []
    for part, is_lookback in ((slice(None, heads.lookback), True), (slice(heads.lookback, None), False)):
        queries, keys, values = q[:, part], k[:, part], v[:, part]
        if not queries.shape[1]:
            continue
        own = frames.pop(0)
        if is_lookback:
            end_keys, end_values = (torch.cat([x[:, :, :context], x[:, :, tail:]], dim=2) for x in (keys, values))
            seen = None if valid is None else torch.cat([valid[..., :context], valid[..., tail:]], dim=3)
            start = attend(queries[:, :, :context], end_keys, end_values, seen)
            end = attend(queries[:, :, tail:], keys, values, valid)
            own = own[:, :, :-1]
        else:
            start = attend(queries[:, :, :context], keys, values, valid)
            end = attend(queries[:, :, tail + 1 :], keys[:, :, :context], values[:, :, :context])
        out.append(torch.cat([start, own, end], dim=2))
    return torch.cat(out, dim=1)


def _one_way(q: Tensor, k: Tensor, v: Tensor, layout: FrameLayout, heads: Heads, is_lookback: bool) -> Tensor:
    """Attention output of the video tokens, (B, H, T S, P), for either the lookback or the lookahead heads.

    Keys and values are split once into blocks of frames, and each block of queries attends to the blocks in reach. With
    slices instead, each slice would have a gradient as long as the video, and the backward pass be quadratic in T.
    """
    size = layout.tokens
    reach = min(heads.reach, max(layout.frames - 1, 0))
    step = min(max(math.ceil(reach / 2), 64 // max(size, 1), 1), max(MAX_QUERIES // max(size, 1), 1))
    neighbors = math.ceil(reach / step)  # blocks in reach of a query, besides the own one
    queries = q.split(layout.sizes, dim=2)[1].split(step * size, dim=2)
    keys, values = (_ContextAndBlocks(x, layout, heads.mode, is_lookback, step) for x in (k, v))
    valid = None if layout.valid is None else layout.valid.flatten(1).split(step * size, dim=1)
    out = []
    for i, query in enumerate(queries):
        blocks = range(max(i - neighbors, 0), i + 1) if is_lookback else range(i, min(i + neighbors + 1, len(queries)))
        key, value = keys.gather(blocks), values.gather(blocks)
        context = key.shape[2] - sum(queries[j].shape[2] for j in blocks)  # tokens of context frames
        shape = (query.shape[2] // size, (key.shape[2] - context) // size, (i - blocks[0]) * step)
        mask: Tensor | None
        if heads.mode == "original":
            mask = _original_band(*shape, i * step + 1, layout, heads.reach, is_lookback, q.device)
        else:
            mask = _band(*shape, heads.reach, is_lookback, size, context, q.device)
        if valid is not None:
            padding = F.pad(torch.cat([valid[j] for j in blocks], dim=1), (context, 0), value=True)[:, None, None]
            if heads.mode == "original" and is_lookback:
                padding[..., layout.context] = valid[-1][:, None, None, -1]
            mask = padding if mask is None else mask & padding
        out.append(attend(query, key, value, mask))
    return torch.cat(out, dim=2)


class _ContextAndBlocks:
    """Keys or values of the attended context frames, and of the video in blocks of ``step`` frames."""

    def __init__(self, x: Tensor, layout: FrameLayout, mode: str, is_lookback: bool, step: int):
        start, frames, end = x.split(layout.sizes, dim=2)
        if mode == "original":
            self.context = [start, frames[:, :, -1:], end] if is_lookback else [start, end]
        else:
            self.context = [start, end] if mode == "both" else [start if is_lookback else end]
        self.blocks = frames.split(step * layout.tokens, dim=2)

    def gather(self, blocks: range) -> Tensor:
        return torch.cat([*self.context, *(self.blocks[j] for j in blocks)], dim=2)


def _band(
    queries: int, keys: int, offset: int, reach: int, is_lookback: bool, tokens: int, context: int, device: torch.device
) -> Tensor | None:
    """Attention mask between frames, bool (queries * S, context + keys * S); ``None`` if nothing is masked.

    The first query frame is ``offset`` frames after the first key frame.
    """
    sign = 1 if is_lookback else -1
    corners = [sign * (offset - keys + 1), sign * (offset + queries - 1)]  # the extreme distances
    if min(corners) >= 0 and max(corners) <= reach:
        return None
    arguments = queries, keys, sign * offset, reach, sign, tokens, context, device
    if torch.compiler.is_compiling():
        return _make_band(*arguments)
    with torch.inference_mode(False):  # a mask cached during validation must also serve training
        return _cached_band(*arguments)


def _make_band(
    queries: int, keys: int, offset: int, reach: int, sign: int, tokens: int, context: int, device: torch.device
) -> Tensor:
    distance = offset + sign * (torch.arange(queries)[:, None] - torch.arange(keys))
    near = (distance >= 0) & (distance <= reach)
    near = near.repeat_interleave(tokens, dim=0).repeat_interleave(tokens, dim=1)
    return F.pad(near, (context, 0), value=True).to(device)


def _original_band(
    queries: int,
    keys: int,
    offset: int,
    first: int,
    layout: FrameLayout,
    reach: int,
    is_lookback: bool,
    device: torch.device,
) -> Tensor:
    """:func:`_band` in mode ``"original"``, over the keys of :class:`_ContextAndBlocks`; the frame index of the first
    query is ``first``."""
    query = torch.arange(first, first + queries, device=device)[:, None]
    key = torch.arange(first - offset, first - offset + keys, device=device)
    distance = query - key if is_lookback else key - query
    near = ((distance >= (0 if is_lookback else 1)) & (distance <= reach)).repeat_interleave(layout.tokens, dim=1)
    everything, last = torch.ones_like(query, dtype=torch.bool), layout.frames
    if is_lookback:  # the last token of frame T is already among the keys of its own frame
        context = [(query <= reach).expand(-1, layout.context), query < last, everything.expand(-1, layout.context)]
    else:
        context = [x.expand(-1, layout.context) for x in (everything, last + 1 - query <= reach)]
    return torch.cat([*context, near], dim=1).repeat_interleave(layout.tokens, dim=0)


_cached_band = lru_cache(maxsize=64)(_make_band)


# ---- layers ----------------------------------------------------------------------------------------------------------


def check_heads(
    dim: int, num_heads: int, num_lookback_heads: int, num_lookahead_heads: int, reach: int, mode: str
) -> None:
    """Validates the arguments of :class:`FrameAttention`, which lists the errors."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_attention_heads={num_heads} must be a positive divisor of the width embed_dim={dim}.")
    if mode not in MODES:
        raise ValueError(f"context_mode={mode!r} is unknown: choose one of {', '.join(map(repr, MODES))}.")
    if mode == "causal" and (num_lookback_heads, num_lookahead_heads) != (num_heads, 0):
        raise ValueError(
            f"context_mode=causal with num_lookback_heads={num_lookback_heads} and num_lookahead_heads="
            f"{num_lookahead_heads}: lookahead heads attend to future frames. Set num_lookback_heads={num_heads} and "
            "num_lookahead_heads=0, or choose 'both' or 'split'."
        )
    if min(num_lookback_heads, num_lookahead_heads) < 0 or num_lookback_heads + num_lookahead_heads != num_heads:
        raise ValueError(
            f"num_lookback_heads={num_lookback_heads} and num_lookahead_heads={num_lookahead_heads} do not add up "
            f"to num_attention_heads={num_heads}: write for example num_lookback_heads={num_heads - num_heads // 2} "
            f"and num_lookahead_heads={num_heads // 2}."
        )
    if reach < 0:
        raise ValueError(f"local_frame_range={reach} must be at least 0, which attends to the own frame only.")


class FrameAttention(nn.Module):
    """Self-attention under the masks of this module, with a fused query-key-value projection. (B, N, D) -> (B, N, D).

    Args:
        dim: width D of the tokens.
        num_heads: number of heads; must divide ``dim``.
        num_lookback_heads, num_lookahead_heads: number of heads of each kind; they add up to ``num_heads``.
        reach: frames R in addition to the own one, 0 or more.
        mode: one of ``MODES``.

    Raises:
        ValueError: for heads that do not add up or do not divide the width, a negative reach, an unknown mode, or
            lookahead heads in mode ``"causal"``.
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
        """Appends frames to a stream in mode ``"causal"``; returns their output, as by :meth:`forward`, and the cache.

        Args:
            x: n frames (B, n * S, D), or the start frame if ``past`` is ``None``.
            tokens: S.
            past: KV cache that the previous call returned.
        """
        q, k, v = self._split(x)
        if past is None:
            out, empty = attend(q, k, v), k.new_empty(*k.shape[:2], 0, k.shape[3])
            return self._merge(out), Past((k.clone(), v.clone()), (empty, empty))
        (k_start, v_start), (k_past, v_past) = past
        k, v = torch.cat([k_past, k], dim=2), torch.cat([v_past, v], dim=2)
        new, all_frames = x.shape[1] // tokens, k.shape[2] // tokens
        mask = _band(new, all_frames, all_frames - new, self.heads.reach, True, tokens, k_start.shape[2], x.device)
        out = attend(q, torch.cat([k_start, k], dim=2), torch.cat([v_start, v], dim=2), mask)
        first = max(all_frames - self.heads.reach, 0) * tokens
        # Copies, since a view would keep the memory of earlier frames
        return self._merge(out), Past(past.start, (k[:, :, first:].clone(), v[:, :, first:].clone()))

    def _split(self, x: Tensor) -> list[Tensor]:
        return [rearrange(part, "b n (h p) -> b h n p", h=self.num_heads) for part in self.qkv(x).chunk(3, dim=-1)]

    def _merge(self, out: Tensor) -> Tensor:
        return self.proj(rearrange(out, "b h n p -> b n (h p)"))


class FrameBlock(nn.Module):
    """Pre-norm transformer block of :class:`FrameAttention` and MLP."""

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
        """Returns (B, N, D) and, if streaming, the KV cache, see :meth:`FrameAttention.extend`."""
        normed, present = self.norm1(x), None
        if streaming:
            attended, present = self.attn.extend(normed, layout.tokens, past)
        else:
            attended = self.attn(normed, layout)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x))), present
