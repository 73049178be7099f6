"""Published text encoders: parity with diffusers' pipelines, on tiny random models."""

import sys
from pathlib import Path

import pytest
import torch

from blueberry_video.models.text_encoder.pretrained import HunyuanText, T5Text

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

CAPTIONS = ["a red square moves left", "a green disc", "", "left " * 400]
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "green", "square", "disc", "moves", "left", "video", "describe"]


def save_tokenizer(folder: Path) -> None:
    """Saves a word-level tokenizer of 12 tokens that appends </s> to every text."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def cogvideox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cogvideox")
    save_tokenizer(folder / "tokenizer")
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": len(WORDS)}
    config = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu")
    transformers.T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hunyuan")
    for name in ("tokenizer", "tokenizer_2"):
        save_tokenizer(folder / name)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": len(WORDS)}
    llama = transformers.LlamaConfig(**sizes, num_hidden_layers=4, num_key_value_heads=2)
    transformers.LlamaModel(llama).save_pretrained(folder / "text_encoder")
    clip = transformers.CLIPTextConfig(**{**sizes, "hidden_size": 8}, num_hidden_layers=2, eos_token_id=1)
    transformers.CLIPTextModel(clip).save_pretrained(folder / "text_encoder_2")
    return folder


def test_t5_equals_the_pipeline(cogvideox: Path):
    text = T5Text(str(cogvideox), length=30)
    pipeline = object.__new__(diffusers.CogVideoXPipeline)
    pipeline.tokenizer, pipeline.text_encoder = text.tokenizer, text.encoder
    expected = pipeline._get_t5_prompt_embeds(CAPTIONS, max_sequence_length=30, device=torch.device("cpu"))
    tokens, mask, pooled = text(CAPTIONS)
    assert tokens.shape == (4, 30, 16)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-6)
    assert mask.sum(dim=1).tolist() == [6, 4, 1, 30]
    assert pooled is None
    assert text.text_dim == 16
    torch.testing.assert_close(text(CAPTIONS[1:2]).tokens, expected[1:2], rtol=0, atol=1e-5)
    assert not text.unconditional(2).tokens.any()
    empty = T5Text(str(cogvideox), length=30, unconditional="empty").unconditional(1).tokens
    torch.testing.assert_close(empty, expected[2:3], rtol=0, atol=1e-5)


def test_hunyuan_equals_the_pipeline(hunyuan: Path):
    text = HunyuanText(str(hunyuan), length=20)
    pipeline = object.__new__(diffusers.HunyuanVideoPipeline)
    pipeline.tokenizer, pipeline.text_encoder = text.tokenizer, text.language
    pipeline.tokenizer_2, pipeline.text_encoder_2 = text.clip_tokenizer, text.clip
    states, pooled, mask = pipeline.encode_prompt(CAPTIONS, max_sequence_length=20, device=torch.device("cpu"))
    found = text(CAPTIONS)
    assert (found.tokens.shape, found.pooled.shape) == ((4, 20, 16), (4, 8))
    torch.testing.assert_close(found.tokens, states, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.pooled, pooled, rtol=0, atol=1e-6)
    assert torch.equal(found.mask, mask.bool())
    assert not found.mask.all()
    assert (text.text_dim, text.pooled_dim) == (16, 8)
    other = HunyuanText(str(hunyuan), length=20, hidden_state_skip_layer=1)(CAPTIONS).tokens
    assert not torch.allclose(other, states)


def test_published_text_encoders_stay_frozen(cogvideox: Path, hunyuan: Path):
    for text in (T5Text(str(cogvideox)), HunyuanText(str(hunyuan))):
        text.train()
        assert text.frozen
        assert not any(module.training for module in text.modules())
        assert not any(parameter.requires_grad for parameter in text.parameters())
        assert not text(["a red square"]).tokens.requires_grad


def test_missing_or_invalid_parts_raise(cogvideox: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"(?s)tokenizer.*nowhere/tokenizer.*diffusers"):
        T5Text(str(tmp_path / "nowhere"))
    save_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(FileNotFoundError, match=r"(?s)T5.*/text_encoder"):
        T5Text(str(tmp_path))
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"(?s)tokenizer.*/tokenizer.*diffusers"):
        T5Text(str(tmp_path))
    with pytest.raises(ValueError, match=r"template='Describe\.'.*\{\}"):
        HunyuanText(str(cogvideox), template="Describe.")


def test_missing_package_raises_with_the_extra(cogvideox: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"(?s)transformers.*pip install -e .*\[pretrained\]"):
        T5Text(str(cogvideox))
