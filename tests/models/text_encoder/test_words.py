"""The word-level text encoder: its tokens, its vocabulary's way through files, its errors."""

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


def test_padding_changes_nothing():
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


def test_the_unconditional_is_what_was_asked_for():
    tokens, mask, pooled = text().unconditional(2)
    assert not tokens.any()
    assert not pooled.any()
    assert mask.all()
    empty = text(unconditional="empty")
    assert torch.equal(empty.unconditional(2).tokens, empty(["", ""]).tokens)
    assert empty.unconditional(2).tokens.any()
    with pytest.raises(ValueError, match="unconditional='none' is unknown"):
        text(unconditional="none")


def test_words():
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


def test_a_learned_vocabulary_is_sorted_and_travels_with_the_weights(tmp_path: Path):
    encoder = text(vocabulary=None)
    encoder.learn(reversed(CAPTIONS))
    assert encoder.vocabulary == tuple(sorted(VOCABULARY))
    encoder.learn(["other words"])  # known already
    assert encoder.vocabulary == tuple(sorted(VOCABULARY))
    safetensors.torch.save_file(encoder.state_dict(), tmp_path / "text.safetensors")
    loaded = text(vocabulary=None)
    loaded.load_state_dict(safetensors.torch.load_file(tmp_path / "text.safetensors"))
    assert loaded.vocabulary == encoder.vocabulary
    assert torch.equal(loaded(CAPTIONS).tokens, encoder(CAPTIONS).tokens)
    torch.save(encoder.state_dict(), tmp_path / "text.pt")
    assert torch.load(tmp_path / "text.pt", weights_only=True).keys() == encoder.state_dict().keys()


def test_weights_of_another_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"another vocabulary .*blue differ.*vocabulary=null"):
        text().load_state_dict(text(vocabulary=[*VOCABULARY, "blue"]).state_dict())
    with pytest.raises(ValueError, match="the order differ"):
        text().load_state_dict(text(vocabulary=VOCABULARY[::-1]).state_dict())


def test_an_averaged_copy_knows_words_learned_after_it_was_made():
    encoder = text(vocabulary=None)
    average = torch.optim.swa_utils.AveragedModel(encoder, use_buffers=False)
    encoder.learn(CAPTIONS)
    average.update_parameters(encoder)
    loaded = text(vocabulary=None)
    loaded.load_state_dict(average.module.state_dict())
    assert loaded.vocabulary == tuple(sorted(VOCABULARY))


def test_bad_captions_are_told_with_word_and_fix():
    with pytest.raises(ValueError, match="'a blue square' has the word 'blue', which is not among the 8 words"):
        text()(["a red square", "a blue square"])
    with pytest.raises(ValueError, match=r"has 5 words, and length=5 holds 4 .*length of the text encoder to 6"):
        text(length=5)(CAPTIONS)
    with pytest.raises(ValueError, match=r"no vocabulary yet: .*learn"):
        text(vocabulary=None)(CAPTIONS)
    with pytest.raises(ValueError, match="hold no word"):
        text(vocabulary=None).learn(["", "…"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocabulary": ["a", "b", "a"]}, "lists 'a' twice"),
        ({"vocabulary": ["two words"]}, r"'two words', which is not one word .*\['two', 'words'\]"),
        ({"vocabulary": ["Red"]}, r"'Red', .*\['red'\]"),
        ({"vocabulary": ["word" * 9]}, "more than 32 bytes"),
        ({"max_words": 7}, "8 words and max_words=7: set max_words of the text encoder to 8"),
        ({"length": 0}, "length=0"),
    ],
)
def test_impossible_settings_are_refused(changes: dict, said: str):
    with pytest.raises(ValueError, match=said):
        text(**changes)


def test_it_is_built_on_the_meta_device():
    with torch.device("meta"):
        encoder = text()
    assert isinstance(encoder, TextEncoder)
    assert {p.device.type for p in encoder.parameters()} == {"meta"}
    assert not encoder.frozen
