"""Text encoder of learned word embeddings, trained with the network; it needs no download.

It has no attention between words; the transformers that receive the tokens do.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from blueberry_video.models.text_encoder.base import TextEncoder, TextTokens

_WORD = re.compile(r"\w+(?:['-]\w+)*")
_PADDING, _START = 0, 1  # token ids; those of words follow
_MAX_BYTES = 32  # per word


def words(caption: str) -> list[str]:
    """Splits a caption into lower-case words without punctuation.

    >>> words("A red square, well-lit, moves left.")
    ['a', 'red', 'square', 'well-lit', 'moves', 'left']
    """
    return _WORD.findall(caption.lower())


class WordText(TextEncoder):
    """Word embeddings for captions of a small vocabulary: a start token, the words, padding.

    The token of a word is the sum of its word and position embeddings; padding is zero. The pooled vector is a linear
    map of the mean over start token and words, so that neither depends on padding.

    Args:
        text_dim: width of a token.
        length: maximum tokens per caption, including the start token.
        vocabulary: the words; None builds it in :meth:`learn`. It is saved with the weights, in the buffer
            ``spelling``.
        max_words: size of the embedding table, at least the number of words.
        pooled_dim: width of the pooled vector; 0 for none.
        unconditional: see :class:`.base.TextEncoder`.

    Raises:
        ValueError: a word that is repeated, longer than 32 bytes or not in the form of :func:`words`, or more than
            ``max_words`` words. In ``forward``: no vocabulary yet, an unknown word, or a caption that is too long. In
            ``load_state_dict``: weights with a different vocabulary.
    """

    frozen = False
    spelling: Tensor

    def __init__(
        self,
        text_dim: int,
        length: int = 16,
        vocabulary: Sequence[str] | None = None,
        max_words: int = 256,
        pooled_dim: int = 0,
        unconditional: Literal["zeros", "empty"] = "zeros",
    ):
        super().__init__(text_dim, length, pooled_dim, unconditional)
        self.max_words = max_words
        self.no_weight_decay = ("embed.weight", "position")
        self.embed = nn.Embedding(_START + 1 + max_words, text_dim)
        self.position = nn.Parameter(torch.zeros(length, text_dim))
        self.pool = nn.Linear(text_dim, pooled_dim) if pooled_dim else None
        # A buffer, not an extra state: EMA copies take over the buffers of the trained network
        self.register_buffer("spelling", torch.zeros(max_words, _MAX_BYTES, dtype=torch.uint8))
        self.register_load_state_dict_post_hook(_take_stored_vocabulary)
        self.vocabulary: tuple[str, ...] = ()
        self._token_ids: dict[str, int] = {}
        self.vocabulary_in_config = vocabulary is not None
        if vocabulary is not None:
            self.set_vocabulary(tuple(vocabulary))
        self.init_weights()

    def init_weights(self) -> None:
        """Initializes word embeddings with unit variance, the scale of a normalized network, and positions with std
        0.02."""
        nn.init.normal_(self.embed.weight)
        nn.init.trunc_normal_(self.position, std=0.02)
        if self.pool is not None:
            nn.init.xavier_uniform_(self.pool.weight)
            nn.init.zeros_(self.pool.bias)

    def learn(self, captions: Iterable[str]) -> None:
        """Sets the vocabulary to the sorted words of ``captions``; does nothing if there is a vocabulary.

        Raises:
            ValueError: the captions have no words, or more than ``max_words``.
        """
        if self.vocabulary:
            return
        found = sorted({word for caption in captions for word in words(caption)})
        if not found:
            raise ValueError(
                "the captions have no words to build a vocabulary from: give the dataset captions, or list the words "
                "in vocabulary of the text encoder."
            )
        self.set_vocabulary(tuple(found))

    def forward(self, captions: list[str]) -> TextTokens:
        """Encodes captions, see :meth:`TextEncoder.forward`; the mask is true at the start token and the words."""
        numbers = torch.tensor([self._encode(caption) for caption in captions], device=self.embed.weight.device)
        mask = numbers != _PADDING  # (B, L)
        tokens = (self.embed(numbers) + self.position) * mask[..., None]
        if self.pool is None:
            return TextTokens(tokens, mask)
        return TextTokens(tokens, mask, self.pool(tokens.sum(dim=1) / mask.sum(dim=1, keepdim=True)))

    def set_vocabulary(self, vocabulary: tuple[str, ...]) -> None:
        """Sets the vocabulary; token ids follow its order. See :class:`WordText` for errors."""
        if len(vocabulary) > self.max_words:
            raise ValueError(
                f"the vocabulary has {len(vocabulary)} words and max_words={self.max_words}: set max_words of the text "
                f"encoder to {len(vocabulary)} or more."
            )
        for word in vocabulary:
            if words(word) != [word]:
                raise ValueError(
                    f"vocabulary has {word!r}, which is not one lower-case word: captions are split into "
                    f"{words(word) or 'no words'}; list these."
                )
            if len(word.encode()) > _MAX_BYTES:
                raise ValueError(f"word {word!r} exceeds {_MAX_BYTES} bytes: separate words of captions by spaces.")
        self._token_ids = {word: index for index, word in enumerate(vocabulary, start=_START + 1)}
        if len(self._token_ids) < len(vocabulary):
            twice = next(word for word in vocabulary if vocabulary.count(word) > 1)
            raise ValueError(f"vocabulary lists {twice!r} twice: remove one.")
        self.vocabulary = vocabulary
        padded = [list(word.encode().ljust(_MAX_BYTES, b"\0")) for word in vocabulary]
        self.spelling.zero_()
        self.spelling[: len(padded)] = torch.tensor(padded, dtype=torch.uint8).view(-1, _MAX_BYTES)

    def _encode(self, caption: str) -> list[int]:
        """Token ids of a caption, padded to ``length``."""
        found = words(caption)
        if found and not self.vocabulary:
            raise ValueError(
                "the text encoder has vocabulary=null: list the words in vocabulary, call learn(captions), or load "
                "trained weights."
            )
        if unknown := [word for word in found if word not in self._token_ids]:
            raise ValueError(
                f"the caption {caption!r} has the word {unknown[0]!r}, which is not one of the "
                f"{len(self.vocabulary)} words of the text encoder: correct the caption, or add the word to "
                "vocabulary and train again (vocabulary=null takes all words of the training captions)."
            )
        if len(found) + 1 > self.length:
            raise ValueError(
                f"the caption {caption!r} has {len(found)} words, but length={self.length} includes the start token: "
                f"set length of the text encoder to at least {len(found) + 1}."
            )
        numbers = [_START, *(self._token_ids[word] for word in found)]
        return numbers + [_PADDING] * (self.length - len(numbers))


def _take_stored_vocabulary(text: WordText, _: object) -> None:
    """Sets the vocabulary from loaded weights; raises a ValueError if the config lists a different one."""
    if text.spelling.is_meta:
        return
    rows = text.spelling.tolist()
    stored = tuple(word for word in (bytes(row).rstrip(b"\0").decode() for row in rows) if word)
    if text.vocabulary_in_config and stored != text.vocabulary:
        differing = sorted(set(stored) ^ set(text.vocabulary)) or ["the order"]
        raise ValueError(
            f"the weights of the text encoder have a vocabulary of {len(stored)} words, the config lists "
            f"{len(text.vocabulary)} ({', '.join(differing[:5])} differ): restore the list, or set vocabulary=null to "
            "use that of the weights."
        )
    text.set_vocabulary(stored)
