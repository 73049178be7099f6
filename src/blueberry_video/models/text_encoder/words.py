"""A text encoder that needs no download: a vector for each word, learned together with the network that reads them.

Words do not attend to each other here: the transformers that take these tokens do that.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from blueberry_video.models.text_encoder.base import TextEncoder, TextTokens

_WORD = re.compile(r"\w+(?:['-]\w+)*")
_PADDING, _START = 0, 1  # numbers of the two tokens that are no word; the first word has the next one
_LONGEST = 32  # bytes of a word


def words(caption: str) -> list[str]:
    """The words of a caption in lower case, without punctuation.

    >>> words("A red square, well-lit, moves left.")
    ['a', 'red', 'square', 'well-lit', 'moves', 'left']
    """
    return _WORD.findall(caption.lower())


class WordText(TextEncoder):
    """Captions of a small vocabulary as tokens: a start token, the words, padding.

    A word's token is its vector plus that of its place; the padding's are zero. The pooled vector is a linear map of
    the mean over start and words, so that padding changes neither.

    Args:
        text_dim: width of a token.
        length: tokens a caption: its words and the start token must fit.
        vocabulary: the words; None leaves them to :meth:`learn`. They travel with the weights (in the buffer
            ``spelling``), so a loaded encoder knows its words.
        max_words: size of the table of vectors, at least the number of words.
        pooled_dim: width of the pooled vector; 0 for none.
        unconditional: see :class:`~blueberry_video.models.text_encoder.base.TextEncoder`.

    Raises:
        ValueError: a word twice, longer than 32 bytes or not as :func:`words` gives them; more than ``max_words``.
            When reading: no vocabulary yet, an unknown word, or a caption too long. When loading: weights of another
            vocabulary.
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
        # A buffer, not an extra state: copies that are averaged over training hold the buffers of the trained network
        self.register_buffer("spelling", torch.zeros(max_words, _LONGEST, dtype=torch.uint8))
        self.register_load_state_dict_post_hook(_take_stored_vocabulary)
        self.vocabulary: tuple[str, ...] = ()
        self._numbers: dict[str, int] = {}
        self.vocabulary_is_given = vocabulary is not None
        if vocabulary is not None:
            self.set_vocabulary(tuple(vocabulary))
        self.init_weights()

    def init_weights(self) -> None:
        """Words have unit variance, so that they weigh as much as anything a normalised network adds to them; places
        a deviation of 0.02."""
        nn.init.normal_(self.embed.weight)
        nn.init.trunc_normal_(self.position, std=0.02)
        if self.pool is not None:
            nn.init.xavier_uniform_(self.pool.weight)
            nn.init.zeros_(self.pool.bias)

    def learn(self, captions: Iterable[str]) -> None:
        """Takes the words of ``captions``, sorted, for the vocabulary; does nothing where it is known already.

        Raises:
            ValueError: there is no word in them, or more than ``max_words``.
        """
        if self.vocabulary:
            return
        found = sorted({word for caption in captions for word in words(caption)})
        if not found:
            raise ValueError(
                "the captions hold no word to build a vocabulary from: give the dataset captions, or list the words "
                "under vocabulary of the text encoder."
            )
        self.set_vocabulary(tuple(found))

    def forward(self, captions: list[str]) -> TextTokens:
        """Captions -> tokens (B, L, D), mask (B, L) that is true on start and words, pooled (B, P) or None."""
        numbers = torch.tensor([self._encode(caption) for caption in captions], device=self.embed.weight.device)
        mask = numbers != _PADDING  # (B, L)
        tokens = (self.embed(numbers) + self.position) * mask[..., None]
        if self.pool is None:
            return TextTokens(tokens, mask)
        return TextTokens(tokens, mask, self.pool(tokens.sum(dim=1) / mask.sum(dim=1, keepdim=True)))

    def set_vocabulary(self, vocabulary: tuple[str, ...]) -> None:
        """Gives the words their numbers, in this order."""
        if len(vocabulary) > self.max_words:
            raise ValueError(
                f"the vocabulary has {len(vocabulary)} words and max_words={self.max_words}: set max_words of the text "
                f"encoder to {len(vocabulary)} or more."
            )
        for word in vocabulary:
            if words(word) != [word]:
                raise ValueError(
                    f"the vocabulary holds {word!r}, which is not one word in lower case: captions are split into "
                    f"{words(word) or 'no words'}; list these."
                )
            if len(word.encode()) > _LONGEST:
                raise ValueError(f"the word {word!r} has more than {_LONGEST} bytes: the captions need spaces.")
        self._numbers = {word: number for number, word in enumerate(vocabulary, start=_START + 1)}
        if len(self._numbers) < len(vocabulary):
            twice = next(word for word in vocabulary if vocabulary.count(word) > 1)
            raise ValueError(f"the vocabulary lists {twice!r} twice: remove one.")
        self.vocabulary = vocabulary
        padded = [list(word.encode().ljust(_LONGEST, b"\0")) for word in vocabulary]
        self.spelling.zero_()
        self.spelling[: len(padded)] = torch.tensor(padded, dtype=torch.uint8).view(-1, _LONGEST)

    def _encode(self, caption: str) -> list[int]:
        """Numbers of the tokens of a caption, padded to ``length``."""
        found = words(caption)
        if found and not self.vocabulary:
            raise ValueError(
                "the text encoder has no vocabulary yet: list the words under vocabulary, call learn(captions), or "
                "load weights that carry one."
            )
        if unknown := [word for word in found if word not in self._numbers]:
            raise ValueError(
                f"the caption {caption!r} has the word {unknown[0]!r}, which is not among the "
                f"{len(self.vocabulary)} words of the text encoder: correct the caption, or add the word to "
                "vocabulary and train again (vocabulary=null takes all words of the training captions)."
            )
        if len(found) + 1 > self.length:
            raise ValueError(
                f"the caption {caption!r} has {len(found)} words, and length={self.length} holds {self.length - 1} "
                f"and the start token: set length of the text encoder to {len(found) + 1} or more."
            )
        numbers = [_START, *(self._numbers[word] for word in found)]
        return numbers + [_PADDING] * (self.length - len(numbers))


def _take_stored_vocabulary(text: WordText, _: object) -> None:
    """After weights were loaded: takes the words they were trained with.

    Raises:
        ValueError: the config lists others.
    """
    if text.spelling.is_meta:
        return
    rows = text.spelling.tolist()
    stored = tuple(word for word in (bytes(row).rstrip(b"\0").decode() for row in rows) if word)
    if text.vocabulary_is_given and stored != text.vocabulary:
        differing = sorted(set(stored) ^ set(text.vocabulary)) or ["the order"]
        raise ValueError(
            f"the weights of the text encoder were trained with another vocabulary ({len(stored)} words, the config "
            f"lists {len(text.vocabulary)}; {', '.join(differing[:5])} differ): their vectors would mean other words. "
            "Restore the list, or set vocabulary=null to take the one in the file."
        )
    text.set_vocabulary(stored)
