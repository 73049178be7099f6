"""Base class and output of text encoders."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn


class TextTokens(NamedTuple):
    """Encoded captions.

    Attributes:
        tokens: (B, L, D) float.
        mask: padding mask (B, L) bool, true at text. A network may ignore it, as CogVideoX does.
        pooled: (B, P) float, one vector per caption, or None.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor | None = None


class TextEncoder(nn.Module, ABC):
    """Base class of text encoders.

    Args:
        text_dim: D, width of a token.
        length: L, tokens per caption, padding included.
        pooled_dim: P, width of the pooled vector; 0 for none.
        unconditional: unconditional text: ``zeros`` (all tokens zero, none masked) or ``empty``, the encoding of "".
            Sampling must use the one from training.

    Attributes:
        frozen: the tokens of a caption never change, so they can be cached.

    Raises:
        ValueError: for an unknown ``unconditional``, or a size out of range.
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
                raise ValueError(f"{key}={value} of the text encoder must be at least {least}.")
        self.text_dim, self.length, self.pooled_dim = text_dim, length, pooled_dim
        self._unconditional = unconditional

    @abstractmethod
    def forward(self, captions: list[str]) -> TextTokens:
        """Encodes B captions to tokens (B, L, D), mask (B, L) and pooled (B, P), on the device of the parameters."""

    def unconditional(self, batch_size: int) -> TextTokens:
        """Unconditional text for classifier-free guidance and caption dropout."""
        if self._unconditional == "empty":
            return self([""] * batch_size)
        like = next(self.parameters())
        return TextTokens(
            tokens=like.new_zeros(batch_size, self.length, self.text_dim),
            mask=torch.ones(batch_size, self.length, dtype=torch.bool, device=like.device),
            pooled=like.new_zeros(batch_size, self.pooled_dim) if self.pooled_dim else None,
        )
