"""Adapter files of diffusers, peft and kohya: scale, names, subsets of layers, merging and strengths."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from blueberry_video.diffusion.lora import LoRA, merge_adapters, plain
from blueberry_video.diffusion.text_to_video import TextToVideo
from blueberry_video.models.cogvideox.model import CogVideoX
from blueberry_video.models.text_encoder.words import WordText

LAYERS = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_out.0")
TARGETS = ("to_q", "to_out.0")
RANK = 4


def transformer(**changes) -> CogVideoX:
    torch.manual_seed(0)
    sizes = {"num_heads": 2, "head_dim": 16, "depth": 1, "in_channels": 4, "out_channels": 4, "text_dim": 8}
    sizes |= {"text_len": 8, "time_dim": 16, "patch_size": 2, "num_frames": 4, "height": 8, "width": 8}
    return CogVideoX(**{**sizes, "positions": "sincos", "zero_init": False, **changes})


def model(**lora) -> TextToVideo:
    settings = LoRA(**{"rank": RANK, "alpha": 16.0, "targets": TARGETS, **lora})
    return TextToVideo(transformer(), WordText(8, 8, ["disc"]), None, settings)


def pairs(layers=LAYERS, rank: int = RANK) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator) / 8  # noqa: E731
    return {layer: (draw(rank, 32), draw(32, rank)) for layer in layers}


def update(network: nn.Module, layer: str) -> Tensor:
    """Returns the change of a weight by the adapters of a network."""
    found = network.get_submodule(layer)
    return found.scaling["default"] * found.lora_B["default"].weight @ found.lora_A["default"].weight


def write(folder: Path, kind: str, alpha: float | None, weights: dict | None = None) -> Path:
    """Writes an adapter file as the named tool does."""
    weights, flat, metadata = pairs() if weights is None else weights, {}, {"format": "pt"}
    file = folder / {"peft": "adapter_model.safetensors", "kohya": "kohya.safetensors"}.get(
        kind, "pytorch_lora_weights.safetensors"
    )
    for layer, (down, up) in weights.items():
        if kind == "kohya":
            name = f"lora_unet_{layer.replace('.', '_')}"
            flat |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            flat |= {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}
        else:
            prefix = {"peft": "base_model.model.", "diffusers": "transformer."}.get(kind, "")
            flat |= {f"{prefix}{layer}.lora_A.weight": down, f"{prefix}{layer}.lora_B.weight": up}
    settings = {"r": RANK, "lora_alpha": alpha}
    if kind == "peft" and alpha is not None:
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    elif kind != "kohya" and alpha is not None:
        prefix = "transformer." if kind == "diffusers" else ""
        metadata["lora_adapter_metadata"] = json.dumps({f"{prefix}{key}": value for key, value in settings.items()})
    save_file(flat, file, metadata)
    return file


@pytest.mark.parametrize("kind", ["diffusers", "diffusers_transformer", "peft", "kohya"])
@pytest.mark.parametrize(("alpha", "scale"), [(2.0, 0.5), (8.0, 2.0), (None, 1.0)])
def test_update_is_that_of_the_file(tmp_path: Path, kind: str, alpha: float | None, scale: float):
    network = model()
    source = write(tmp_path, kind, alpha)
    assert "loaded the adapters" in network.load_published(source)
    for layer, (down, up) in pairs().items():
        torch.testing.assert_close(update(network.transformer, layer), scale * up @ down)


def test_diffusers_reads_the_same_update(tmp_path: Path):
    diffusers = pytest.importorskip("diffusers")
    transformer().save_published(tmp_path / "base")
    theirs = diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path / "base")
    from peft import LoraConfig

    theirs.add_adapter(LoraConfig(r=RANK, lora_alpha=2, target_modules=list(TARGETS)))
    for layer, (down, up) in pairs().items():
        found = theirs.get_submodule(layer)
        found.lora_A["default"].weight.data, found.lora_B["default"].weight.data = down, up
    theirs.save_lora_adapter(tmp_path / "saved")
    network = model()
    network.load_published(tmp_path / "saved" / "pytorch_lora_weights.safetensors")
    for layer in LAYERS:
        torch.testing.assert_close(update(network.transformer, layer), update(theirs, layer))


def test_rslora_and_alpha_per_layer_are_read(tmp_path: Path):
    file = write(tmp_path, "peft", 2.0)
    settings = {"lora_alpha": 2, "use_rslora": True, "alpha_pattern": {"to_q": 6}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    network = model()
    network.load_published(file)
    for (layer, (down, up)), alpha in zip(pairs().items(), (6, 2)):
        torch.testing.assert_close(update(network.transformer, layer), alpha / RANK**0.5 * up @ down)


def test_layers_without_adapters_in_the_file_are_not_changed(tmp_path: Path):
    network = model()
    network.load_published(write(tmp_path, "kohya", 2.0))
    network.load_published(write(tmp_path, "diffusers", 2.0, pairs(LAYERS[:1])))
    assert update(network.transformer, LAYERS[0]).any()
    assert not update(network.transformer, LAYERS[1]).any()


def test_layers_of_a_lower_rank_are_padded(tmp_path: Path):
    weights = pairs(LAYERS[:1]) | pairs(LAYERS[1:], rank=2)
    network = model()
    network.load_published(write(tmp_path, "kohya", 1.0, weights))
    for layer, (down, up) in weights.items():
        torch.testing.assert_close(update(network.transformer, layer), up @ down / len(down))


def test_advice_for_a_different_rank_or_different_layers_works(tmp_path: Path):
    file = write(tmp_path, "kohya", 2.0)
    for wrong in ({"rank": 2}, {"targets": ("to_k",)}):
        fix = r"model\.lora\.rank=4\b.*model\.lora\.targets=\[attn1\.to_out\.0,attn1\.to_q\]"
        with pytest.raises(ValueError, match=fix):
            model(**wrong).load_published(file)
    network = model(rank=4, targets=("attn1.to_out.0", "attn1.to_q"))
    network.load_published(file)
    assert update(network.transformer, LAYERS[1]).any()


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight": torch.ones(4, 32)}, "save_lora_adapter"),
        ({f"transformer.{LAYERS[0]}.lora_A.weight": torch.ones(4, 32)}, r"to_q has shapes.*'down': \(4, 32\)"),
        (
            {
                f"transformer.{LAYERS[0]}.lora_A.weight": torch.ones(4, 64),
                f"transformer.{LAYERS[0]}.lora_B.weight": torch.ones(64, 4),
            },
            r"\(4, 64\).*\(rank, 32\)",
        ),
        (
            {
                f"transformer.{LAYERS[0]}.lora_A.weight": torch.ones(4, 32),
                f"transformer.{LAYERS[0]}.lora_magnitude_vector": torch.ones(32),
            },
            r"lora_magnitude_vector.*DoRA",
        ),
    ],
)
def test_foreign_adapters_raise(tmp_path: Path, state: dict, expected: str):
    save_file(state, tmp_path / "adapter.safetensors")
    network = model()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=rf"adapter\.safetensors.*{expected}"):
        network.load_published(tmp_path / "adapter.safetensors")
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_adapters_without_lora_settings_raise_with_the_fix(tmp_path: Path):
    file = write(tmp_path, "kohya", 2.0)
    with pytest.raises(ValueError, match=r"kohya\.safetensors.*model\.lora=null.*\+model/lora=default"):
        TextToVideo(transformer(), WordText(8, 8, ["disc"])).load_published(file)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merged_weights_are_rounded_once_and_weights_are_unchanged(tmp_path: Path, dtype: torch.dtype):
    network = model(alpha=3.0)
    network.load_published(write(tmp_path, "kohya", 3.0))
    network.to(dtype)
    before = {name: value.clone() for name, value in network.transformer.named_parameters()}
    with plain(network.transformer, merged=True) as merged:
        for layer in LAYERS:
            found = network.transformer.get_submodule(layer).weight
            base = before[f"{layer}.base_layer.weight"].double()
            up, down = (before[f"{layer}.lora_{part}.default.weight"].double() for part in "BA")
            torch.testing.assert_close(found, (base + 0.75 * up @ down).to(dtype), rtol=1e-6, atol=1e-7)
        merged.get_submodule(LAYERS[0]).weight.data.zero_()
    after = dict(network.transformer.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_several_adapters_are_merged_with_strengths(tmp_path: Path):
    (tmp_path / "other").mkdir()
    one, other = write(tmp_path, "kohya", 2.0), write(tmp_path / "other", "peft", 8.0, pairs(LAYERS[:1], rank=2))
    network = transformer().bfloat16()
    before = copy.deepcopy(network.state_dict())
    merged = merge_adapters(network, {one: 0.8, other: -0.5})
    (down, up), (other_down, other_up) = pairs()[LAYERS[0]], pairs(LAYERS[:1], rank=2)[LAYERS[0]]
    wide = before[f"{LAYERS[0]}.weight"].float() + 0.8 * 0.5 * (up @ down) - 0.5 * 4 * (other_up @ other_down)
    torch.testing.assert_close(merged.state_dict()[f"{LAYERS[0]}.weight"], wide.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in merged.parameters())
    with pytest.raises(ValueError, match=r"has adapters.*model\.lora=null"):
        merge_adapters(model().transformer, {one: 1.0})
