"""Inputs that all backends of the scan share.

Shapes: B batch, L tokens, T frames, H heads, G groups of heads that share B and C, P channels of a head, N state size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Direction(NamedTuple):
    """Per-token parameters of one scan direction, or their gradients."""

    dt: Tensor  # (B, L, H)
    a: Tensor  # (B, L, H): log-decay, dt * A
    B: Tensor  # (B, L, G, N)
    C: Tensor  # (B, L, G, N)


class ScanInputs(NamedTuple):
    """Inputs of a scan in the order of the registered operator's schema; also holds the gradients of these inputs.

    Suffix ``_f`` is the forward direction, ``_b`` the backward direction, which is ``None`` in a causal scan.
    """

    x: Tensor  # (B, L, H, P)
    dt_f: Tensor
    a_f: Tensor
    B_f: Tensor
    C_f: Tensor
    dt_b: Tensor | None
    a_b: Tensor | None
    B_b: Tensor | None
    C_b: Tensor | None
    D: Tensor | None  # (B, L, H)
    lengths: Tensor | None  # (B, T): tokens of each frame; None if all frames have segment_len tokens
    segment_len: int  # tokens of each frame, or an upper bound of lengths
    h0: Tensor | None = None  # (B, H, P, N): forward state before the first frame
    g0: Tensor | None = None  # (B, T, H, P, N): backward state after the last token of each frame
    chunk: int | None = None  # tokens of a chunk; the backend's default if None or 0

    @property
    def forward(self) -> Direction:
        return Direction(*self[1:5])

    @property
    def backward(self) -> Direction | None:
        return None if self.dt_b is None else Direction(*self[5:9])  # type: ignore[arg-type]

    @property
    def per_token(self) -> tuple[Tensor | None, ...]:
        """The tensors with one entry per token, x to D."""
        return self[:10]

    @property
    def num_frames(self) -> int:
        return self.x.shape[1] // self.segment_len if self.lengths is None else self.lengths.shape[1]

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.promote_types(self.x.dtype, torch.float32)

    def map_tokens(self, function: Callable[[Tensor], Tensor]) -> "ScanInputs":
        """Applies ``function`` to every per-token tensor."""
        return self._make([*(None if tensor is None else function(tensor) for tensor in self.per_token), *self[10:]])  # type: ignore[call-arg, arg-type]
