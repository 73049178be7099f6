"""Joint attention over text and video, chunk-wise causal masks and the KV cache that they permit.

In chunk-wise causal attention (CausVid, arXiv 2412.07772) text attends to text, and a video token to the text and to
the frames of the same and of earlier chunks. Generated frames never change, so their keys and values can be cached.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from blueberry_video.nn.rope import Rotation, rotate
from blueberry_video.parallel.sequence import TokenShards

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (sample, head, query, key) -> True where attended


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
    """Softmax attention of queries (B, heads, N, d) over keys and values (B, heads, M, d) -> (B, heads, N, d).

    ``mask`` is bool, broadcast to (B, heads, N, M), true where attended, or a block mask for FlexAttention.
    """
    if isinstance(mask, BlockMask):
        flex: Any = flex_attention
        if q.is_cuda and not torch.compiler.is_compiling():
            flex = _compiled_flex_attention()
        return flex(q, k, v, block_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def block_causal_mask(
    text_len: int,
    num_frames: int,
    tokens_per_frame: int,
    chunk: int,
    text_first: bool = True,
    device: torch.device | None = None,
) -> Tensor:
    """Chunk-wise causal attention mask, bool (queries N, keys N), N = text_len + num_frames * tokens_per_frame.

    Args:
        text_len: number of text tokens.
        num_frames, tokens_per_frame: size of the video.
        chunk: frames per chunk; the last chunk may be shorter.
        text_first: the order is [text, video]; otherwise [video, text].
        device: of the mask.

    Raises:
        ValueError: if ``chunk`` is not positive.
    """
    attended = _mask_mod(text_len, num_frames, tokens_per_frame, chunk, text_first)
    index = torch.arange(text_len + num_frames * tokens_per_frame, device=device)
    return attended(index, index, index[:, None], index[None])


def block_causal(
    text_len: int,
    num_frames: int,
    tokens_per_frame: int,
    chunk: int,
    first_frame: int = 0,
    device: torch.device | None = None,
) -> Tensor | BlockMask | None:
    """:func:`block_causal_mask` of [text, video] in the form that :func:`attend` takes, optionally with a KV cache.

    Args:
        first_frame: number of cached frames before the ``num_frames`` evaluated ones, a multiple of ``chunk``. If it is
            positive, the cache also holds the text, and the queries are those of the evaluated frames.

    Returns:
        bool (queries, keys); on CUDA without cached frames a block mask, with which FlexAttention skips masked blocks;
        ``None`` if every query attends to all keys.
    """
    if first_frame:
        if num_frames <= chunk:
            return None
        whole = block_causal_mask(text_len, first_frame + num_frames, tokens_per_frame, chunk, device=device)
        return whole[text_len + first_frame * tokens_per_frame :]
    if device is not None and device.type == "cuda":
        return _flex_mask(text_len, num_frames, tokens_per_frame, chunk, device)
    return block_causal_mask(text_len, num_frames, tokens_per_frame, chunk, device=device)


class KeyValueCache:
    """KV cache of all layers for chunk-wise causal sampling, in the order [text, frames].

    A model called with a cache and ``first_frame`` keeps the text and the earlier frames, and overwrites the rest with
    the frames it evaluates. All denoising steps of a chunk thus share the cache, and a final pass over the finished
    chunk at time 0 caches it for the next one. A cache belongs to one model, one batch and one text.
    """

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, keys: Tensor, values: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        """Replaces the tokens of a layer after the first ``kept`` and returns all keys and values.

        Args:
            layer: index of the layer.
            keys, values: (B, heads, N, d) of the new tokens, normalized and rotated.
            kept: number of tokens to keep, of text and earlier frames.

        Returns:
            Keys and values (B, heads, kept + N, d).

        Raises:
            ValueError: if the layer holds fewer than ``kept`` tokens, or a different batch size.
        """
        if kept:
            if self.num_tokens(layer) < kept:
                raise ValueError(
                    f"the cache holds {self.num_tokens(layer)} tokens, but the text and the frames before first_frame "
                    f"have {kept}: evaluate the earlier frames with this cache first, starting at first_frame=0."
                )
            held_keys, held_values = self._layers[layer]
            if len(held_keys) != len(keys):
                raise ValueError(
                    f"the cache has batch size {len(held_keys)}, the input {len(keys)}: create a new KeyValueCache for "
                    "every batch."
                )
            keys = torch.cat([held_keys[:, :, :kept], keys], dim=2)
            values = torch.cat([held_values[:, :, :kept], values], dim=2)
        self._layers[layer] = keys, values
        return keys, values

    def num_tokens(self, layer: int = 0) -> int:
        """Number of cached text and video tokens of a layer."""
        return self._layers[layer][0].shape[2] if layer in self._layers else 0


class Shared(NamedTuple):
    """Inputs common to all blocks of a forward pass over [text, video] of L and N tokens.

    Under sequence parallelism, blocks and ``rotation`` have the text and the video tokens of this process.
    """

    text_len: int  # L; 0 if the text is in the cache
    rotation: Rotation | None = None  # (L + N, 1, head_dim); the text is not rotated
    mask: Tensor | BlockMask | None = None  # attention mask, see attend()
    cache: KeyValueCache | None = None
    kept: int = 0  # number of cached tokens of text and earlier frames
    shards: TokenShards | None = None  # split of the video tokens over processes

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Attention of q, k, v (B, N, heads, d), with the cached tokens of ``layer`` prepended to k, v -> (B, N, D)."""
        if self.shards is not None:
            q, k, v = self.shards.to_heads(q, k, v, text_len=self.text_len)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if self.cache is not None:
            k, v = self.cache.update(layer, k, v, self.kept)
        out = attend(q, k, v, self.mask).transpose(1, 2)
        return (out if self.shards is None else self.shards.to_tokens(out, self.text_len)).flatten(2)


class HeadNormProjections(nn.Module):
    """Query, key and value projections with query-key normalization per head and rotary position embedding.

    Args:
        dim: D; a multiple of ``num_heads``.
        num_heads: attention heads.
        norm: builds the norm for a head width.
        project_out: add an output projection ``to_out``.
    """

    def __init__(self, dim: int, num_heads: int, norm: Callable[[int], nn.Module], project_out: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (norm(dim // num_heads) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)]) if project_out else None

    def heads(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, D) -> q, k, v (B, N, heads, head_dim), q and k normalized and rotated."""
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)) for layer in (self.to_q, self.to_k, self.to_v))
        q, k = self.norm_q(q), self.norm_k(k)
        return (q, k, v) if rotation is None else (rotate(q, rotation), rotate(k, rotation), v)


class HeadNormAttention(HeadNormProjections):
    """Self-attention with query-key normalization per head: (B, N, D) -> (B, N, D)."""

    def forward(self, x: Tensor, shared: Shared, layer: int = 0) -> Tensor:
        attended = shared.attend(*self.heads(x, shared.rotation), layer)
        return attended if self.to_out is None else self.to_out[0](attended)


def _mask_mod(text_len: int, num_frames: int, tokens_per_frame: int, chunk: int, text_first: bool) -> MaskMod:
    if chunk < 1:
        raise ValueError(f"chunk={chunk} frames must be at least 1.")
    first_video = text_len if text_first else 0
    first_text = 0 if text_first else num_frames * tokens_per_frame
    chunk_tokens = chunk * tokens_per_frame

    def attended(_sample: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_is_text = (query >= first_text) & (query < first_text + text_len)
        key_is_text = (key >= first_text) & (key < first_text + text_len)
        not_later = (key - first_video) // chunk_tokens <= (query - first_video) // chunk_tokens
        return key_is_text | (~query_is_text & not_later)

    return attended


@functools.lru_cache(maxsize=8)
def _flex_mask(text_len: int, num_frames: int, tokens_per_frame: int, chunk: int, device: torch.device) -> BlockMask:
    length = text_len + num_frames * tokens_per_frame
    attended = _mask_mod(text_len, num_frames, tokens_per_frame, chunk, text_first=True)
    with torch.inference_mode(False):  # a mask cached during validation must also serve training
        return create_block_mask(attended, None, None, length, length, device=device)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)  # in eager mode it materializes all scores
