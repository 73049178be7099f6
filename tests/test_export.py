"""Export: a run as a diffusers folder and back, with equal outputs, written completely or not at all."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from blueberry_video import export
from blueberry_video.config import compose
from blueberry_video.diffusion.lora import LoRA
from blueberry_video.diffusion.text_to_video import TextToVideo
from blueberry_video.experiment.checkpoint import AtomicCheckpointIO, weights_file
from blueberry_video.inference.export import export_model
from blueberry_video.models.autoencoder.causal_vae import CausalVideoVAE
from blueberry_video.models.cogvideox.model import CogVideoX
from blueberry_video.models.hunyuan_video.model import HunyuanVideo
from blueberry_video.models.text_encoder.words import WordText

SIZES = {"num_heads": 2, "head_dim": 16, "depth": 1, "in_channels": 4, "out_channels": 4, "text_dim": 8, "text_len": 8}
SIZES |= {"time_dim": 16, "patch_size": 2, "num_frames": 5, "height": 8, "width": 8, "positions": "sincos"}
TARGETS = ["to_q"]


def model(lora: LoRA | None = None, **changes) -> TextToVideo:
    torch.manual_seed(0)
    transformer = CogVideoX(**{**SIZES, **changes}, zero_init=False)
    return TextToVideo(transformer, WordText(8, 8, ["disc"]), None, lora)


def output(transformer: torch.nn.Module) -> torch.Tensor:
    noise = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 4, 2, 8, 8, generator=noise), torch.randn(1, 8, 8, generator=noise)
    with torch.no_grad():
        return transformer(latents, torch.tensor([300.0]), text)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Folder of a finished run with the files that the export reads."""
    folder = tmp_path / "outputs" / "tiny" / "2026-01-01"
    (folder / "checkpoints").mkdir(parents=True)
    node = {"_target_": "blueberry_video.models.cogvideox.CogVideoX", **SIZES, "zero_init": False}
    words = {"_target_": "blueberry_video.models.text_encoder.words.WordText", "text_dim": 8, "length": 8}
    whole = {"_target_": "blueberry_video.diffusion.text_to_video.TextToVideo", "transformer": node, "text": words}
    source = Path(__file__).resolve().parents[1] / "experiments" / "cogvideox" / "config.yaml"
    config = OmegaConf.to_container(compose(source))
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "model": whole}))
    (folder / "run.json").write_text(json.dumps({"started": "2026-01-01T00:00:00", "status": "finished"}))
    averaged = {
        f"model.{name}": value + 0.01 for name, value in model().state_dict().items() if value.is_floating_point()
    }
    state = {f"model.{name}": value for name, value in model().state_dict().items()}
    content = {"state_dict": {**state, **averaged, "pixel": torch.zeros(1)}, "current_model_state": state}
    AtomicCheckpointIO().save_checkpoint(content, folder / "checkpoints" / "step_00000010.ckpt")
    return folder


def test_exported_run_has_the_ema_weights_and_equal_outputs_in_diffusers(run: Path, tmp_path: Path):
    diffusers = pytest.importorskip("diffusers")
    written = export.run(run.parent, tmp_path / "published")
    assert written == [tmp_path / "published" / "transformer"]
    theirs = diffusers.CogVideoXTransformer3DModel.from_pretrained(written[0])
    expected = model().transformer
    expected.load_state_dict({name: value + 0.01 for name, value in expected.state_dict().items()})
    noise = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 4, 2, 8, 8, generator=noise), torch.randn(1, 8, 8, generator=noise)
    with torch.no_grad():
        result = theirs(latents.transpose(1, 2), text, torch.tensor([300]))[0].transpose(1, 2)
    torch.testing.assert_close(result, output(expected), rtol=1e-5, atol=1e-5)


def test_weights_load_from_an_exported_folder_and_from_a_run(run: Path, tmp_path: Path):
    export.run(run, tmp_path / "published")
    for source in (tmp_path / "published", run):
        fresh = model(num_heads=2)
        with torch.no_grad():
            next(fresh.transformer.parameters()).zero_()
        fresh.load_published(weights_file(source))
        expected = model().transformer
        expected.load_state_dict({name: value + 0.01 for name, value in expected.state_dict().items()})
        torch.testing.assert_close(output(fresh.transformer), output(expected))


def test_interrupted_export_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(*_: object, **__: object) -> None:
        (tmp_path / ".transformer.tmp").mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("blueberry_video.weights.diffusers_folder.save_torch_state_dict", killed)
        with pytest.raises(KeyboardInterrupt):
            model().save_published(tmp_path)
    assert not (tmp_path / "transformer").exists()
    model().save_published(tmp_path)
    assert (tmp_path / "transformer" / "config.json").is_file()
    assert not (tmp_path / ".transformer.tmp").exists()
    with pytest.raises(FileExistsError, match=r"/transformer\b"):
        model().save_published(tmp_path)


def test_load_message_names_the_variant_and_the_image_condition(tmp_path: Path):
    model().save_published(tmp_path / "cog")
    assert re.search(r"CogVideoX\b.*\b1\b.*\b32\b.*/cog", model().load_published(tmp_path / "cog"))
    sizes = {"in_channels": 3, "out_channels": 3, "num_heads": 1, "head_dim": 16, "depth": 1, "single_depth": 1}
    sizes |= {"refiner_depth": 1, "text_dim": 6, "pooled_dim": 6, "rope_axes": (4, 6, 6)}
    trained, fresh = (
        TextToVideo(HunyuanVideo(**sizes, image_condition=kind), WordText(6, pooled_dim=6), None)
        for kind in ("token_replace", None)
    )
    trained.save_published(tmp_path / "hunyuan")
    assert re.search(r"image_condition=token_replace\b.*None", fresh.load_published(tmp_path / "hunyuan"))


def test_adapters_are_written_separately_or_merged(tmp_path: Path):
    adapted = model(LoRA(rank=2, targets=TARGETS))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert adapted.save_published(tmp_path / "alone") == [tmp_path / "alone" / "pytorch_lora_weights.safetensors"]
    with pytest.raises(FileExistsError, match=r"/pytorch_lora_weights\.safetensors\b"):
        adapted.save_published(tmp_path / "alone")
    fresh = model(LoRA(rank=2, targets=TARGETS))
    fresh.load_published(tmp_path / "alone" / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(output(fresh.transformer), output(adapted.transformer))
    adapted.save_published(tmp_path / "merged", merge=True)
    merged = model()
    merged.load_published(tmp_path / "merged")
    torch.testing.assert_close(output(merged.transformer), output(adapted.transformer), rtol=1e-4, atol=1e-4)


def test_missing_trained_text_encoder_is_reported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    export.run(run, tmp_path / "published")
    assert re.search(rf"WordText.*init_from={run}", capsys.readouterr().err)
    assert (
        json.loads((tmp_path / "published/transformer/config.json").read_text())["trained_text_encoder"] == "WordText"
    )
    with pytest.warns(UserWarning, match=r"/published was trained with a WordText.*init_from="):
        model().load_published(tmp_path / "published")
    with pytest.warns(UserWarning, match=r"/published was trained with a WordText"):
        CogVideoX.from_published(tmp_path / "published")
    adapted = model(LoRA(rank=2, targets=TARGETS))
    adapted.save_published(tmp_path / "adapters")
    with pytest.warns(UserWarning, match=r"\.safetensors was trained with a WordText"):
        adapted.load_published(tmp_path / "adapters" / "pytorch_lora_weights.safetensors")


def test_published_text_encoders_are_not_reported(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    frozen = TextToVideo(model().transformer)
    frozen.save_published(tmp_path)
    frozen.load_published(tmp_path)
    assert "trained_text_encoder" not in json.loads((tmp_path / "transformer/config.json").read_text())
    assert not [warning for warning in recwarn if "was trained with" in str(warning.message)]


def test_merged_export_is_rounded_once(tmp_path: Path, run: Path):
    adapted = model(LoRA(rank=2, alpha=3.0, targets=TARGETS))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["lora"] = {"_target_": "blueberry_video.diffusion.lora.LoRA", "rank": 2, "alpha": 3.0}
    config["model"]["lora"] |= {"targets": TARGETS, "base": str(tmp_path / "base")}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    model().save_published(tmp_path / "base")
    state = {f"model.{name}": value for name, value in adapted.state_dict().items()}
    AtomicCheckpointIO().save_checkpoint({"state_dict": state}, run / "checkpoints" / "step_00000020.ckpt")
    export.run(run, tmp_path / "merged", dtype="bfloat16", merge=True)
    layer = "transformer_blocks.0.attn1.to_q"
    found = CogVideoX.from_published(tmp_path / "merged").get_submodule(layer).weight
    lora = adapted.transformer.get_submodule(layer)
    wide = lora.base_layer.weight + 1.5 * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    assert torch.equal(found, wide.bfloat16())


def test_adapters_start_from_published_weights(tmp_path: Path):
    other = model()
    with torch.no_grad():
        for parameter in other.transformer.parameters():
            parameter.add_(0.02)
    other.save_published(tmp_path)
    adapted = model(LoRA(base=str(tmp_path), rank=2, targets=TARGETS))
    adapted.load_published(adapted.lora.base)
    torch.testing.assert_close(output(adapted.transformer), output(other.transformer))


def test_weights_of_a_different_variant_raise(tmp_path: Path):
    model().save_published(tmp_path)
    with pytest.raises(ValueError, match="in_channels=4"):
        model(in_channels=8).load_published(tmp_path)


def test_export_of_another_model_raises(run: Path, tmp_path: Path):
    other = CausalVideoVAE()
    with pytest.raises(ValueError, match=r"CausalVideoVAE.*layout"):
        export_model(other, tmp_path / "out", {})
    with pytest.raises(ValueError, match=r"format onnx.*diffusers"):
        export.run(run, tmp_path / "out", format="onnx")


def test_output_file_and_missing_run_raise(run: Path, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FileExistsError, match=rf"--out={out} .*/file is a file"):
            export.run(run, out)
    with pytest.raises(FileNotFoundError, match=r"/nowhere .*`make train EXP=<experiment>`"):
        export.run(tmp_path / "nowhere", tmp_path / "out")


def test_float16_raises_for_models_that_overflow(run: Path, tmp_path: Path):
    export.run(run, tmp_path / "sincos", dtype="float16")  # CogVideoX-2B is published in float16
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["transformer"]["positions"] = "rope"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"dtype=float16 .*CogVideoX.*DTYPE=bfloat16"):
        export.run(run, tmp_path / "rope", dtype="float16")
    assert export.run(run, tmp_path / "rope", dtype="bfloat16") == [tmp_path / "rope" / "transformer"]
