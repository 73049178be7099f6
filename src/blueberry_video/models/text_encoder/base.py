"""What a text encoder gives to a transformer."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn


class TextTokens(NamedTuple):
    """Encoded captions.

    Attributes:
        tokens: (B, L, D) float.
        mask: (B, L) bool: which of the tokens are text, not padding. A network may ignore it (CogVideoX does).
        pooled: (B, P) float, one vector a caption, or None.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor | None = None


class TextEncoder(nn.Module, ABC):
    """Base of what turns captions into tokens.

    Args:
        text_dim: D, width of a token.
        length: L, tokens a caption, padding included.
        pooled_dim: P, width of the pooled vector; 0 for none.
        unconditional: what stands for "no caption": ``zeros`` (every token zero, none of them padding) or ``empty``,
            the encoding of "". A network must be asked for the one that it was trained with.

    Attributes:
        frozen: whether a caption's tokens never change, so that they may be computed once and stored.

    Raises:
        ValueError: for another ``unconditional``, or a size out of range.
    """

    frozen: bool

    def __init__(
        self, text_dim: int, length: int, pooled_dim: int = 0, unconditional: Literal["zeros", "empty"] = "zeros"
    ):
        super().__init__()
        if unconditional not in ("zeros", "empty"):
            raise ValueError(f"unconditional={unconditional!r} is unknown: choose 'zeros' or 'empty'.")
        for key, value, least in (("text_dim", text_dim, 1), ("length", length, 1), ("pooled_dim", pooled_dim, 0)):
            if value < least:
                raise ValueError(f"{key}={value} of the text encoder is too small: use at least {least}.")
        self.text_dim, self.length, self.pooled_dim = text_dim, length, pooled_dim
        self._unconditional = unconditional

    @abstractmethod
    def forward(self, captions: list[str]) -> TextTokens:
        """Tokens (B, L, D), mask (B, L) and pooled (B, P) of B captions, on the device of the parameters."""

    def unconditional(self, batch_size: int) -> TextTokens:
        """What a network is given in the place of captions, for guidance and where training drops one."""
        if self._unconditional == "empty":
            return self([""] * batch_size)
        like = next(self.parameters())
        return TextTokens(
            tokens=like.new_zeros(batch_size, self.length, self.text_dim),
            mask=torch.ones(batch_size, self.length, dtype=torch.bool, device=like.device),
            pooled=like.new_zeros(batch_size, self.pooled_dim) if self.pooled_dim else None,
        )
