"""WordText: tokens, vocabulary in files, and errors."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from blueberry_video.models.text_encoder.base import TextEncoder
from blueberry_video.models.text_encoder.words import WordText, words

CAPTIONS = ["a red square moves left", "a green disc moves up"]
VOCABULARY = ["a", "red", "green", "square", "disc", "moves", "left", "up"]


def text(**changes) -> WordText:
    torch.manual_seed(0)
    return WordText(**{"text_dim": 6, "length": 8, "vocabulary": VOCABULARY, "pooled_dim": 4, **changes})


def test_tokens_mask_and_pooled():
    tokens, mask, pooled = text()([*CAPTIONS, ""])
    assert (tokens.shape, mask.shape, pooled.shape) == ((3, 8, 6), (3, 8), (3, 4))
    assert mask.dtype == torch.bool
    assert mask.sum(dim=1).tolist() == [6, 6, 1]  # the start token comes first
    assert not tokens[~mask].any()
    assert torch.equal(tokens[0, :2], tokens[1, :2])  # start, "a"
    assert not torch.equal(tokens[0, 2], tokens[1, 2])
    assert torch.isfinite(pooled).all()
    assert text(pooled_dim=0)(CAPTIONS).pooled is None


def test_padding_does_not_change_the_output():
    short, long = text(length=6), text(length=9)
    long.load_state_dict({**long.state_dict(), **{k: v for k, v in short.state_dict().items() if k != "position"}})
    with torch.no_grad():
        long.position[:6] = short.position
    a, b = short(CAPTIONS), long(CAPTIONS)
    assert torch.equal(a.tokens, b.tokens[:, :6])
    assert torch.allclose(a.pooled, b.pooled, atol=1e-6)


def test_every_parameter_receives_a_gradient():
    encoder = text()
    tokens, _, pooled = encoder([" ".join(VOCABULARY[:7])])
    (tokens.square().sum() + pooled.square().sum()).backward()
    assert {name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()} == set()


def test_unconditional_text_is_zeros_or_the_empty_caption():
    tokens, mask, pooled = text().unconditional(2)
    assert not tokens.any()
    assert not pooled.any()
    assert mask.all()
    empty = text(unconditional="empty")
    assert torch.equal(empty.unconditional(2).tokens, empty(["", ""]).tokens)
    assert empty.unconditional(2).tokens.any()
    with pytest.raises(ValueError, match=r"unconditional='none'.*'zeros'.*'empty'"):
        text(unconditional="none")


def test_words_are_lower_case_without_punctuation():
    assert words("A red square, well-lit: 2 of the dog's!") == [
        "a",
        "red",
        "square",
        "well-lit",
        "2",
        "of",
        "the",
        "dog's",
    ]
    assert torch.equal(*(text()([caption]).tokens for caption in ("a red square", "A  RED square.")))


def test_learned_vocabulary_is_sorted_and_saved_with_the_weights(tmp_path: Path):
    encoder = text(vocabulary=None)
    encoder.learn(reversed(CAPTIONS))
    assert encoder.vocabulary == tuple(sorted(VOCABULARY))
    encoder.learn(["other words"])  # ignored, since a vocabulary exists
    assert encoder.vocabulary == tuple(sorted(VOCABULARY))
    safetensors.torch.save_file(encoder.state_dict(), tmp_path / "text.safetensors")
    loaded = text(vocabulary=None)
    loaded.load_state_dict(safetensors.torch.load_file(tmp_path / "text.safetensors"))
    assert loaded.vocabulary == encoder.vocabulary
    assert torch.equal(loaded(CAPTIONS).tokens, encoder(CAPTIONS).tokens)
    torch.save(encoder.state_dict(), tmp_path / "text.pt")
    assert torch.load(tmp_path / "text.pt", weights_only=True).keys() == encoder.state_dict().keys()


def test_weights_of_a_different_vocabulary_raise():
    with pytest.raises(ValueError, match=r"(?s)\b9\b.*\b8\b.*\bblue\b.*vocabulary=null"):
        text().load_state_dict(text(vocabulary=[*VOCABULARY, "blue"]).state_dict())
    with pytest.raises(ValueError, match=r"(?s)\b8\b.*\b8\b.*order.*vocabulary=null"):
        text().load_state_dict(text(vocabulary=VOCABULARY[::-1]).state_dict())


def test_averaged_copy_receives_a_vocabulary_learned_later():
    encoder = text(vocabulary=None)
    average = torch.optim.swa_utils.AveragedModel(encoder, use_buffers=False)
    encoder.learn(CAPTIONS)
    average.update_parameters(encoder)
    loaded = text(vocabulary=None)
    loaded.load_state_dict(average.module.state_dict())
    assert loaded.vocabulary == tuple(sorted(VOCABULARY))


def test_invalid_captions_raise():
    with pytest.raises(ValueError, match=r"'a blue square'.*'blue'.*\b8\b.*vocabulary=null"):
        text()(["a red square", "a blue square"])
    with pytest.raises(ValueError, match=r"'a red square moves left'.*\b5\b.*length=5\b.*\b6\b"):
        text(length=5)(CAPTIONS)
    with pytest.raises(ValueError, match=r"vocabulary=null.*learn"):
        text(vocabulary=None)(CAPTIONS)
    with pytest.raises(ValueError, match=r"word.*vocabulary"):
        text(vocabulary=None).learn(["", "…"])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vocabulary": ["a", "b", "a"]}, "vocabulary.*'a'"),
        ({"vocabulary": ["two words"]}, r"vocabulary.*'two words'.*\['two', 'words'\]"),
        ({"vocabulary": ["Red"]}, r"vocabulary.*'Red'.*\['red'\]"),
        ({"vocabulary": ["word" * 9]}, r"'(word){9}'.*\b32\b"),
        ({"max_words": 7}, r"\b8\b.*max_words=7\b.*\b8\b"),
        ({"length": 0}, r"length=0\b"),
    ],
)
def test_invalid_settings_raise(changes: dict, expected: str):
    with pytest.raises(ValueError, match=expected):
        text(**changes)


def test_builds_on_the_meta_device():
    with torch.device("meta"):
        encoder = text()
    assert isinstance(encoder, TextEncoder)
    assert {p.device.type for p in encoder.parameters()} == {"meta"}
    assert not encoder.frozen
