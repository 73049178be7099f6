"""TextToVideo: trainable and frozen parts, state dict, copies, LoRA and errors."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from blueberry_video.diffusion.lora import LoRA, load_adapters, plain, save_adapters
from blueberry_video.diffusion.text_to_video import TextToVideo
from blueberry_video.models.autoencoder.base import Autoencoder, Pixels
from blueberry_video.models.cogvideox.model import CogVideoX
from blueberry_video.models.hunyuan_video.model import HunyuanVideo
from blueberry_video.models.hunyuan_video.model_15 import HunyuanVideo15
from blueberry_video.models.text_encoder.base import TextEncoder, TextTokens
from blueberry_video.models.text_encoder.words import WordText

LAYERS = ("to_q", "to_out.0")


def cogvideox(**changes) -> CogVideoX:
    sizes = {"num_heads": 2, "head_dim": 16, "depth": 1, "in_channels": 3, "out_channels": 3, "text_dim": 8}
    sizes |= {"text_len": 8, "time_dim": 16, "patch_size": 4, "num_frames": 4, "height": 8, "width": 8}
    torch.manual_seed(0)
    return CogVideoX(**{**sizes, "positions": "rope", "zero_init": False, **changes})


def words(**changes) -> WordText:
    torch.manual_seed(1)
    return WordText(**{"text_dim": 8, "length": 8, "vocabulary": ["a", "disc", "moves"], **changes})


class FrozenText(TextEncoder):
    """Frozen text encoder, as published encoders are."""

    frozen = True

    def __init__(self, text_dim: int = 8):
        super().__init__(text_dim, 8)
        self.table = nn.Embedding(128, text_dim)

    def forward(self, captions: list[str]) -> TextTokens:
        numbers = torch.tensor([[ord(letter) for letter in caption.ljust(8)[:8]] for caption in captions])
        return TextTokens(self.table(numbers.to(self.table.weight.device)), numbers > 0)


class Shrinking(Autoencoder):
    """Autoencoder with a parameter that halves the number of rows and columns."""

    def __init__(self) -> None:
        super().__init__(channels=3, stride=(1, 2, 2))
        self.scale = nn.Parameter(torch.ones(1))

    def encode(self, video):
        half = video[..., ::2, ::2] * self.scale
        return torch.cat([half, torch.full_like(half, -torch.inf)], dim=1)

    def decode(self, latents):
        return latents.repeat_interleave(2, 3).repeat_interleave(2, 4)


def output(model: TextToVideo) -> torch.Tensor:
    latents = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(latents, torch.tensor([10.0, 900.0]), model.text(["a disc", "moves"]))


def test_word_encoder_is_trainable():
    model = TextToVideo(cogvideox(), words(), Pixels())
    names = dict(model.named_parameters())
    assert any("embed.weight" in name for name in names)
    assert all(parameter.requires_grad for parameter in names.values())
    latents = torch.zeros(1, 3, 4, 8, 8)
    model(latents, torch.tensor([5.0]), model.text(["a disc"])).square().mean().backward()
    assert model.text.embed.weight.grad.abs().sum() > 0


def test_frozen_parts_are_not_in_the_state_dict_and_stay_in_eval_mode():
    text, autoencoder = FrozenText(), Shrinking()
    model = TextToVideo(cogvideox(), text, autoencoder).train()
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"transformer"}
    assert {name.split(".")[0] for name in model.state_dict()} == {"transformer"}
    assert not text.training
    assert not any(parameter.requires_grad for part in (text, autoencoder) for parameter in part.parameters())


def test_copy_has_its_own_frozen_parts():
    model = TextToVideo(cogvideox(), FrozenText(), Shrinking())
    before, twin = output(model), copy.deepcopy(model)
    assert torch.equal(output(twin), before)
    for convert in (torch.nn.Module.bfloat16, lambda module: module.to("meta")):
        converted = convert(copy.deepcopy(model))
        for part in (converted.text, converted.autoencoder):
            assert all(p.is_meta or p.dtype == torch.bfloat16 for p in part.parameters())
        assert torch.equal(output(model), before)
        assert model.autoencoder.scale.dtype == torch.float32
        assert model.autoencoder.scale.item() == 1
    with torch.no_grad():
        twin.autoencoder.scale.fill_(3)
        twin.text.table.weight.zero_()
    assert model.autoencoder.scale.item() == 1
    assert torch.equal(output(model), before)


def test_copy_of_an_unbuilt_part_builds_its_own():
    model = TextToVideo(cogvideox(), FrozenText, Shrinking)
    twin = copy.deepcopy(model)
    twin.prepare()
    twin.double()
    assert model.autoencoder.scale.dtype == torch.float32
    assert model.text is not twin.text


def test_frozen_parts_keep_their_values_when_the_model_is_emptied():
    model = TextToVideo(cogvideox(), FrozenText(), Shrinking())
    before, state = output(model), copy.deepcopy(model.state_dict())
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        nn.ModuleList([model]).to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    model.load_state_dict(state)
    assert torch.equal(output(model), before)


def test_frozen_parts_move_with_the_model():
    model = TextToVideo(cogvideox(), FrozenText(), Shrinking())
    model.to(torch.float64)
    assert model.text.table.weight.dtype == model.autoencoder.scale.dtype == torch.float64


def test_prepare_moves_only_frozen_parts():
    """Strategies that shard the network do not move the module."""
    model = TextToVideo(cogvideox(), FrozenText(), Shrinking())
    model.prepare(torch.device("meta"))
    assert model.text.table.weight.is_meta
    assert model.autoencoder.scale.is_meta
    assert not any(parameter.is_meta for parameter in model.transformer.parameters())


class Counting(FrozenText):
    """Encodes "" as the unconditional text and counts the calls."""

    calls = 0

    def unconditional(self, batch_size: int) -> TextTokens:
        self.calls += 1
        return self([""] * batch_size)


def test_unconditional_text_of_a_frozen_encoder_is_cached():
    model = TextToVideo(cogvideox(), Counting(), Pixels())
    with torch.inference_mode():  # as in validation
        first = model.unconditional(3)
    assert first.tokens.shape == (3, 8, 8)
    assert torch.equal(first.tokens, model.text([""] * 3).tokens)
    assert torch.equal(first.mask, model.text([""] * 3).mask)
    latents = torch.zeros(1, 3, 4, 8, 8)
    model(latents, torch.tensor([5.0]), model.unconditional(1)).sum().backward()
    assert model.text.calls == 1
    model.to(torch.float64)
    assert model.unconditional(1).tokens.dtype == torch.float64
    model.prepare(torch.device("cpu"))
    model.unconditional(1)
    assert model.text.calls == 2


def test_unconditional_text_of_a_trained_encoder_is_not_cached():
    model = TextToVideo(cogvideox(), words(unconditional="empty"), Pixels())
    before = model.unconditional(2)
    assert before.tokens.requires_grad
    with torch.no_grad():
        model.text.embed.weight.add_(1.0)
    assert not torch.allclose(model.unconditional(2).tokens, before.tokens)
    with pytest.raises(ValueError, match=r"model\.text\b"):
        TextToVideo(cogvideox()).unconditional(1)


TINY = {"num_heads": 2, "head_dim": 16, "depth": 2, "refiner_depth": 1, "mlp_ratio": 2.0, "text_dim": 8}
TINY |= {"patch_size": (1, 4, 4), "out_channels": 3, "rope_axes": (4, 6, 6), "zero_init": False}


@pytest.mark.parametrize(
    "transformer",
    [
        cogvideox(),
        cogvideox(causal_chunk=2),
        HunyuanVideo(in_channels=3, **TINY, single_depth=1, pooled_dim=0),
        HunyuanVideo(in_channels=3, **TINY, single_depth=0, pooled_dim=0),
        HunyuanVideo(in_channels=3, **TINY, single_depth=0, pooled_dim=0, causal_chunk=2),
        HunyuanVideo(in_channels=3, **TINY, single_depth=0, pooled_dim=6),
        HunyuanVideo15(in_channels=7, **TINY, letters_dim=5, image_dim=6),
        HunyuanVideo15(in_channels=7, **TINY, letters_dim=5, image_dim=6, causal_chunk=2),
    ],
)
@pytest.mark.parametrize("targets", [None, ("to_q", "to_add_out", "ff_context.net.2")])
def test_trainable_parameters_have_gradients(transformer: nn.Module, targets: tuple[str, ...] | None):
    """Required by DDP."""
    lora = None if targets is None else LoRA(rank=2, targets=targets)
    if lora is not None and isinstance(transformer, CogVideoX):
        lora = LoRA(rank=2, targets=("to_q", "ff.net.2"))
    model = TextToVideo(copy.deepcopy(transformer), words(pooled_dim=6), Pixels(), lora)
    latents = torch.randn(2, model.shape.in_channels, 4, 8, 8)
    model(latents, torch.tensor([10.0, 900.0]), model.text(["a disc", "moves"])).square().mean().backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert [name for name in trained if model.get_parameter(name).grad is None] == []


def test_parts_given_as_factories_are_built_by_prepare():
    built = []
    model = TextToVideo(
        cogvideox(), lambda: built.append("text") or FrozenText(), lambda: built.append("autoencoder") or Pixels()
    )
    assert built == []
    model.prepare()
    assert sorted(built) == ["autoencoder", "text"]
    assert output(model).shape == (2, 3, 4, 8, 8)
    assert sorted(built) == ["autoencoder", "text"], "built a second time"


def test_parts_of_mismatched_sizes_raise():
    with pytest.raises(ValueError, match=r"transformer\.text_dim=8\b.*model\.text\.text_dim=6\b"):
        TextToVideo(cogvideox(), words(text_dim=6), Pixels())
    with pytest.raises(ValueError, match=r"transformer\.out_channels=4\b.*model\.autoencoder\.channels=3\b"):
        TextToVideo(cogvideox(in_channels=4, out_channels=4), words(), Pixels())
    with pytest.raises(ValueError, match=r"text_dim=8\b.*model\.text\.text_dim=4\b"):
        TextToVideo(cogvideox(), lambda: FrozenText(4), Pixels()).prepare()
    pooled = HunyuanVideo(3, 3, (1, 4, 4), 2, 16, 1, 1, 1, 2.0, 8, 5, rope_axes=(4, 6, 6))
    with pytest.raises(ValueError, match=r"transformer\.pooled_dim=5\b.*model\.text\.pooled_dim=0\b"):
        TextToVideo(pooled, words(), Pixels())


def test_trainable_encoder_given_as_a_factory_raises():
    with pytest.raises(ValueError, match=r"model\.text.*WordText.*_partial_: true"):
        TextToVideo(cogvideox(), words, Pixels()).prepare()


def test_check_clip_raises_with_the_nearest_legal_sizes():
    model = TextToVideo(cogvideox(), words(), Shrinking())
    assert model.check_clip(4, 16, 24) == (4, 8, 12)
    with pytest.raises(ValueError, match=r"height=20\b.*\b8\b.*\b(16\b.*\b24|24\b.*\b16)\b"):
        model.check_clip(4, 20, 24)
    with pytest.raises(ValueError, match=r"model\.autoencoder\b.*data=latents"):
        TextToVideo(cogvideox(), words()).check_clip(4, 16, 16)


def test_causal_transformer_accepts_one_timestep_for_all_frames():
    model = TextToVideo(cogvideox(causal_chunk=2), words(), Pixels())
    latents, text = torch.randn(2, 3, 4, 8, 8), model.text(["a disc", "moves"])
    with torch.no_grad():
        one = model(latents, torch.tensor([10.0, 900.0]), text)
        each = model(latents, torch.tensor([[10.0] * 4, [900.0] * 4]), text)
    torch.testing.assert_close(one, each)


# ---- adapters --------------------------------------------------------------------------------------------------------


def adapted(**changes) -> TextToVideo:
    return TextToVideo(
        cogvideox(), FrozenText(), Pixels(), LoRA(**{"rank": 2, "alpha": 4.0, "targets": LAYERS, **changes})
    )


def train(model: TextToVideo) -> None:
    """Sets the adapters to random values, so that they change the output."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))


def test_adapters_start_at_zero_and_are_the_only_trainable_and_saved_weights():
    model = adapted()
    without = TextToVideo(cogvideox(), model.text, Pixels())
    torch.testing.assert_close(output(model), output(without), rtol=0, atol=0)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(model.state_dict())
    assert all("lora_" in name for name in model.state_dict())
    assert len(model.state_dict()) == 2 * len(LAYERS)


def test_checkpoint_of_adapters_loads_strictly():
    model, fresh = adapted(), adapted()
    train(model)
    fresh.text.load_state_dict(model.text.state_dict())
    assert not torch.equal(output(model), output(fresh))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(output(model), output(fresh), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="lora_A"):
        fresh.load_state_dict({})


def test_frozen_weights_can_be_loaded_and_merged_under_adapters():
    model = adapted()
    train(model)
    before = output(model)
    with plain(model.transformer) as transformer:
        assert transformer.state_dict().keys() == cogvideox().state_dict().keys()
        transformer.load_state_dict({name: value + 0.1 for name, value in transformer.state_dict().items()})
    assert not torch.allclose(output(model), before)
    with plain(model.transformer, merged=True) as transformer:
        merged = TextToVideo(copy.deepcopy(transformer), model.text, Pixels())
    torch.testing.assert_close(output(merged), output(model), rtol=1e-4, atol=1e-4)


def test_diffusers_loads_the_adapters_and_their_scale(tmp_path: Path):
    diffusers = pytest.importorskip("diffusers")
    sizes = {"in_channels": 4, "out_channels": 4, "patch_size": 2, "num_frames": 4, "positions": "sincos"}
    text = FrozenText()
    model = TextToVideo(cogvideox(**sizes), text, None, LoRA(rank=2, alpha=6.0, targets=LAYERS))
    train(model)
    with plain(model.transformer) as transformer:
        transformer.save_published(tmp_path / "base")
    file = save_adapters(model.transformer, model.lora, tmp_path / "lora")
    theirs = diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path / "base")
    theirs.load_lora_adapter(str(file), prefix="transformer")
    latents, time, tokens = torch.randn(1, 4, 4, 8, 8), torch.tensor([300]), text(["a disc"])
    with torch.no_grad():
        own = model(latents, time.float(), tokens)
        expected = theirs(latents.transpose(1, 2), tokens.tokens, time)[0].transpose(1, 2)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


def test_adapters_of_a_different_rank_or_of_different_layers_raise(tmp_path: Path):
    model = adapted()
    train(model)
    file = save_adapters(model.transformer, model.lora, tmp_path)
    fresh = adapted()
    load_adapters(fresh.transformer, fresh.lora, file)
    torch.testing.assert_close(fresh.state_dict(), model.state_dict())
    for changes, expected in (
        ({"rank": 3}, r"\(2, 32\).*\(3, 32\).*lora\.rank"),
        ({"targets": ("to_q",)}, r"\b4\b.*\b2\b.*to_out\.0\.lora_A.*lora\.targets"),
    ):
        other = adapted(**changes)
        before = {name: value.clone() for name, value in other.state_dict().items()}
        with pytest.raises(ValueError, match=rf"pytorch_lora_weights\.safetensors.*{expected}"):
            load_adapters(other.transformer, other.lora, file)
        torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [({"rank": 0}, r"lora\.rank=0\b"), ({"alpha": 0.0}, r"lora\.alpha=0\.0"), ({"targets": ()}, r"lora\.targets=\[\]")],
)
def test_settings_of_adapters_out_of_range_raise(wrong: dict, expected: str):
    with pytest.raises(ValueError, match=expected):
        LoRA(**wrong)


def test_unknown_target_layer_raises_with_its_name():
    with pytest.raises(ValueError, match=r"lora\.targets.*'query'.*CogVideoX.*to_q"):
        adapted(targets=("query",))


def test_missing_peft_raises_with_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"peft.*pip install -e .*\[pretrained\]"):
        adapted()
