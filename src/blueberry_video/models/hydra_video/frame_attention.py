"""Attention of each frame to itself and to the last frames: sliding window over time, bidirectional within a frame.

Shapes: B batch, t frames of S = h w tokens, D width, H heads of P channels, F frames of the window.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blueberry_video.models.hydra_video.chunks import Chunks
from blueberry_video.models.hydra_video.mixer import ReturnState
from blueberry_video.models.hydra_video.state_space import Layout
from blueberry_video.nn.rope import RotaryPositions, Rotation, rotate


class AttentionState(NamedTuple):
    """Keys and values of the last F - 1 frames; its size does not depend on the number of frames."""

    keys: Tensor  # (B, F - 1, S, H, P), without rotary embedding
    values: Tensor
    valid: Tensor  # (B, F - 1) bool, false before the first frame


@dataclass
class AttentionCache:
    """Keys and values (B, F, S, H, P) of the window of one frame, which is the last, and the valid frames (B, F)."""

    chunks: Chunks
    positions: Tensor  # (chunks, q)
    keys: Tensor
    values: Tensor
    valid: Tensor


class FrameAttention(nn.Module):
    """Token mixer with the interface of :class:`~blueberry_video.models.hydra_video.mixer.HydraVideoMixer`.

    Queries of a frame attend to all tokens of the frame and of the F - 1 frames before it, with a rotary embedding of
    row, column and time relative to the window.

    Args:
        dim: Width D of the tokens.
        head_dim: Channels P of a head; even, at least 6.
        frame: Rows and columns (h, w) of a frame.
        window: Frames F of the window, the own frame included.

    Raises:
        ValueError: For sizes that do not divide or are out of range; in ``forward`` for tokens of a different grid or a
            state of a different shape.
    """

    def __init__(self, dim: int, head_dim: int, frame: tuple[int, int], window: int):
        super().__init__()
        if head_dim < 1 or dim % head_dim:
            raise ValueError(f"head_dim={head_dim} of the attention layers must divide embed_dim={dim}.")
        if window < 1:
            raise ValueError(f"attention_frames={window} must be at least 1, the own frame.")
        self.num_heads, self.head_dim, self.frame, self.window = dim // head_dim, head_dim, frame, window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rope = RotaryPositions((window, *frame), head_dim)

    def forward(
        self, x: Tensor, layout: Layout, state: AttentionState | None = None, return_state: ReturnState = False
    ) -> tuple[Tensor, AttentionState | None]:
        """Mixes tokens (B, t S, D); arguments and results as those of the Hydra Video mixer, without dropped tokens."""
        (t, *frame), batch, tokens = layout.grid, len(x), self.frame[0] * self.frame[1]
        if tuple(frame) != self.frame or layout.keep is not None or x.shape[1] != t * tokens:
            raise ValueError(
                f"x has {x.shape[1]} tokens in a grid {layout.grid}: attention layers require all tokens of frames of "
                f"{self.frame[0]} x {self.frame[1]}."
            )
        state = self._checked(state, batch)
        query, key, value = self._project(x.unflatten(1, (t, tokens)))
        keys, values = torch.cat([state.keys.to(key), key], 1), torch.cat([state.values.to(value), value], 1)
        valid = F.pad(state.valid, (0, t), value=True)
        windows = torch.arange(t, device=x.device)[:, None] + torch.arange(self.window, device=x.device)  # (t, F)
        folded = [part[:, windows].flatten(0, 1) for part in (keys, values, valid)]  # (B t, F, …)
        y = self._attend(query.flatten(0, 1), *folded).unflatten(0, (batch, t)).flatten(1, 2)
        if return_state == "before_frames":
            return y, AttentionState(*(part[:, :-1] for part in folded))
        return y, AttentionState(*(part[:, t:].clone() for part in (keys, values, valid))) if return_state else None

    def initial_state(self, batch: int, frame: tuple[int, int]) -> AttentionState:
        """Returns the empty state of B videos with frames of (h, w) tokens, equal to ``state=None``."""
        size = (batch, self.window - 1, frame[0] * frame[1], self.num_heads, self.head_dim)
        keys = self.qkv.weight.new_zeros(size)
        return AttentionState(keys, keys.clone(), keys.new_zeros(size[:2], dtype=torch.bool))

    def check_chunks(self, chunks: Chunks) -> None:
        """Accepts all chunks."""

    @torch.no_grad()
    def cache_frame(
        self, x: Tensor, chunks: Chunks, state: AttentionState | None = None
    ) -> tuple[Tensor, AttentionCache]:
        """Mixes the tokens (B, S, D) of one frame, and caches the keys and values of its window."""
        state = self._checked(state, len(x))
        query, key, value = self._project(x[:, None])
        keys, values = torch.cat([state.keys.to(key), key], 1), torch.cat([state.values.to(value), value], 1)
        valid, positions = F.pad(state.valid, (0, 1), value=True), chunks.positions().to(x.device)
        y = self._attend(query[:, 0], keys, values, valid)
        return y, AttentionCache(chunks, positions, keys, values, valid)

    @torch.no_grad()
    def update_chunk(self, x: Tensor, index: int, cache: AttentionCache, advance: bool = True) -> Tensor:
        """Mixes the tokens (B, q, D) of one chunk, after replacing their cached keys and values in place.

        Args:
            advance: Has no effect: there is no running state.
        """
        at = cache.positions[index]
        query, key, value = self._project(x[:, None])
        cache.keys[:, -1, at], cache.values[:, -1, at] = key[:, 0], value[:, 0]
        return self._attend(query[:, 0], cache.keys, cache.values, cache.valid, at)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, t, n, D) -> queries, keys and values (B, t, n, H, P)."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(3)
        return query, key, value

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """Queries (B, n, H, P) at ``positions`` of the last frame, by default all, and a window (B, F, S, H, P) ->
        (B, n, D)."""
        turn, tokens = self.rope(), keys.shape[2]
        last = Rotation(*(table[-tokens:] if positions is None else table[-tokens:][positions] for table in turn))
        q, k = rotate(query.transpose(1, 2), last), rotate(keys.flatten(1, 2).transpose(1, 2), turn)
        v, mask = values.flatten(1, 2).transpose(1, 2), valid.repeat_interleave(tokens, 1)[:, None, None]
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))

    def _checked(self, state: AttentionState | None, batch: int) -> AttentionState:
        own = self.initial_state(batch, self.frame)
        if state is not None and state.keys.shape != own.keys.shape:
            raise ValueError(
                f"the state has keys of shape {tuple(state.keys.shape)}, expected {tuple(own.keys.shape)}: pass the "
                "state that this layer returned for the preceding frames of the same batch."
            )
        return own if state is None else state
