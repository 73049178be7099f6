"""Attention over text and video together, also causal in time, and the cache of keys and values that this allows.

Causal by chunks (CausVid, arXiv 2412.07772): text sees text; a token of the video sees the text and the frames of its
own and of earlier chunks. So what has been generated never changes, and its keys and values can be kept.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from blueberry_video.nn.rope import Rotation, rotate

Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (sample, head, query, key) -> may it see it


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
    """Softmax attention (B, heads, N, d) of queries (B, heads, N, d) over keys and values (B, heads, M, d).

    Args:
        q, k, v: as above.
        mask: what may be seen: bool, broadcasting to (B, heads, N, M), or blocks for flex_attention; ``None``: all.
    """
    if isinstance(mask, BlockMask):
        return _compiled_flex_attention()(q, k, v, block_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def block_causal_mask(
    text_len: int,
    num_frames: int,
    tokens_per_frame: int,
    chunk: int,
    text_first: bool = True,
    device: torch.device | None = None,
) -> Tensor:
    """Which token (row) may see which (column): bool (N, N), N = text_len + num_frames * tokens_per_frame.

    Args:
        text_len: tokens of the text.
        num_frames, tokens_per_frame: of the video.
        chunk: frames that see each other; the last chunk may be shorter.
        text_first: the order is [text, video]; otherwise [video, text].
        device: of the mask.

    Raises:
        ValueError: if ``chunk`` is not positive.
    """
    visible = _block_causal(text_len, num_frames, tokens_per_frame, chunk, text_first)
    index = torch.arange(text_len + num_frames * tokens_per_frame, device=device)
    return visible(index, index, index[:, None], index[None])


def block_causal(
    text_len: int,
    num_frames: int,
    tokens_per_frame: int,
    chunk: int,
    first: int = 0,
    device: torch.device | None = None,
) -> Tensor | BlockMask | None:
    """What :func:`attend` takes of :func:`block_causal_mask`, in the order [text, video], also behind a cache.

    On CUDA it is blocks for flex_attention, which skips what is hidden.

    Args:
        text_len: tokens of the text.
        num_frames, tokens_per_frame: of the video that is evaluated.
        chunk: frames that see each other.
        first: frames before these, a multiple of ``chunk``. If there are any, a cache holds their keys and those of the
            text, and queries are of the video alone.
        device: of the mask.

    Returns:
        bool (queries, keys) or blocks; ``None`` if the queries may see all keys.

    Raises:
        ValueError: if ``chunk`` is not positive.
    """
    if first:
        if num_frames <= chunk:
            return None
        whole = block_causal_mask(text_len, first + num_frames, tokens_per_frame, chunk, device=device)
        return whole[text_len + first * tokens_per_frame :]
    if device is not None and device.type == "cuda":
        return _flex_mask(text_len, num_frames, tokens_per_frame, chunk, device)
    return block_causal_mask(text_len, num_frames, tokens_per_frame, chunk, device=device)


class KeyValueCache:
    """Keys and values of every layer of a causal model, in the order [text, frames], for clips made chunk by chunk.

    A model given a cache and ``first_frame`` keeps the text and the frames before it, and puts the frames it evaluates
    behind them, in place of what was there. So a chunk is denoised with the same cache in every step, and a last pass
    over the finished chunk at time 0 leaves what the next chunk must see.

    A cache belongs to one model, one batch and one text.
    """

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def join(self, layer: int, keys: Tensor, values: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        """The first ``kept`` tokens that a layer holds, and behind them the new ones: from then on what it holds.

        Args:
            layer: index of the layer.
            keys, values: (B, heads, N, d) of the new tokens, turned and normalised.
            kept: tokens to keep, of text and earlier frames.

        Returns:
            Keys and values (B, heads, kept + N, d).

        Raises:
            ValueError: if the layer holds fewer tokens than are to be kept, or those of another batch.
        """
        if kept:
            if self.num_tokens(layer) < kept:
                raise ValueError(
                    f"the cache holds {self.num_tokens(layer)} tokens, but the frames before first_frame and the text "
                    f"have {kept}: evaluate the earlier frames with this cache first, from first_frame=0 on."
                )
            held_keys, held_values = self._layers[layer]
            if len(held_keys) != len(keys):
                raise ValueError(
                    f"the cache was filled by a batch of {len(held_keys)}, not of {len(keys)}: make a new "
                    "KeyValueCache for every batch."
                )
            keys = torch.cat([held_keys[:, :, :kept], keys], dim=2)
            values = torch.cat([held_values[:, :, :kept], values], dim=2)
        self._layers[layer] = keys, values
        return keys, values

    def num_tokens(self, layer: int = 0) -> int:
        """Tokens of text and video that a layer holds."""
        return self._layers[layer][0].shape[2] if layer in self._layers else 0


class Shared(NamedTuple):
    """What all blocks of a forward pass are given alike, over [text, video] of L and N tokens."""

    text_len: int  # L; 0 where the cache holds the text
    rotation: Rotation | None = None  # (L + N, 1, head_dim); the text is not turned
    mask: Tensor | BlockMask | None = None  # which keys a query sees
    cache: KeyValueCache | None = None
    kept: int = 0  # tokens of text and earlier frames that the cache holds

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Attention of the tokens q, k, v (B, N, heads, d) over them, and over those that the cache holds before them
        in its place ``layer``: (B, N, D)."""
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if self.cache is not None:
            k, v = self.cache.join(layer, k, v, self.kept)
        return attend(q, k, v, self.mask).transpose(1, 2).flatten(2)


class HeadNormProjections(nn.Module):
    """Queries, keys and values of tokens; queries and keys are normalised head by head, then turned.

    Args:
        dim: D; a multiple of ``num_heads``.
        num_heads: attention heads.
        norm: makes the norm of a head of a width.
        project_out: a projection ``to_out`` behind it.
    """

    def __init__(self, dim: int, num_heads: int, norm: Callable[[int], nn.Module], project_out: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (norm(dim // num_heads) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)]) if project_out else None

    def heads(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, D) -> q, k, v (B, N, heads, head_dim), q and k normalised and turned."""
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)) for layer in (self.to_q, self.to_k, self.to_v))
        q, k = self.norm_q(q), self.norm_k(k)
        return (q, k, v) if rotation is None else (rotate(q, rotation), rotate(k, rotation), v)


class HeadNormAttention(HeadNormProjections):
    """Self-attention with normalised heads: (B, N, D) -> (B, N, D)."""

    def forward(self, x: Tensor, shared: Shared, layer: int = 0) -> Tensor:
        attended = shared.attend(*self.heads(x, shared.rotation), layer)
        return attended if self.to_out is None else self.to_out[0](attended)


def _block_causal(text_len: int, num_frames: int, tokens_per_frame: int, chunk: int, text_first: bool) -> Visible:
    if chunk < 1:
        raise ValueError(f"chunk={chunk} frames: a chunk has 1 or more.")
    first_video = text_len if text_first else 0
    first_text = 0 if text_first else num_frames * tokens_per_frame
    chunk_tokens = chunk * tokens_per_frame

    def visible(_sample: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_is_text = (query >= first_text) & (query < first_text + text_len)
        key_is_text = (key >= first_text) & (key < first_text + text_len)
        not_later = (key - first_video) // chunk_tokens <= (query - first_video) // chunk_tokens
        return key_is_text | (~query_is_text & not_later)

    return visible


@functools.lru_cache(maxsize=8)
def _flex_mask(text_len: int, num_frames: int, tokens_per_frame: int, chunk: int, device: torch.device) -> BlockMask:
    length = text_len + num_frames * tokens_per_frame
    visible = _block_causal(text_len, num_frames, tokens_per_frame, chunk, text_first=True)
    with torch.inference_mode(False):  # it is kept for later, also for training
        return create_block_mask(visible, None, None, length, length, device=device)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """Only compiled does it skip blocks; in eager mode it materialises all scores."""
    return torch.compile(flex_attention)
