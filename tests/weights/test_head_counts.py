"""Number of attention heads of loaded weights, which no tensor determines: from a config or the caller."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from blueberry_video.models import dinov2, vit
from blueberry_video.models.jepa import model as jepa
from blueberry_video.models.jepa import world_model
from blueberry_video.models.masked_autoencoder.model import MaskedAutoencoder
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.weights.load import num_heads_of


def autoencoder(width: int = 96, heads: int = 3, decoder_heads: int = 2) -> MaskedAutoencoder:
    encoder = VisionTransformer(16, 4, 8, 2, embed_dim=width, depth=1, num_heads=heads, qkv_bias="qv")
    return MaskedAutoencoder(encoder, decoder_dim=192, decoder_depth=1, decoder_num_heads=decoder_heads)


def bare(folder: Path, model: torch.nn.Module) -> Path:
    torch.save(model.state_dict(), folder / "bare.pth")
    return folder / "bare.pth"


def of_a_run(folder: Path, model: MaskedAutoencoder, heads: int) -> Path:
    """Writes a checkpoint of a run with ``heads`` heads in its config."""
    (folder / "checkpoints").mkdir()
    config = {"model": {"encoder": {"num_heads": heads}, "decoder_num_heads": 2}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    file = folder / "checkpoints" / "step_00000001.ckpt"
    torch.save({"state_dict": {f"model.{name}": value for name, value in model.state_dict().items()}}, file)
    return file


def test_width_of_no_published_model_requires_the_number_of_heads(tmp_path: Path):
    file = bare(tmp_path, autoencoder(width=96, heads=3))
    with pytest.raises(ValueError, match=rf"{file} .*width=96\b.*num_heads=…"):
        MaskedAutoencoder.from_published(file, num_frames=4, image_size=16)
    read = MaskedAutoencoder.from_published(file, num_frames=4, image_size=16, num_heads=3, decoder_num_heads=2)
    assert (read.encoder.num_heads, read.decoder_num_heads) == (3, 2)


def test_number_of_heads_is_not_guessed_from_the_width(tmp_path: Path):
    file = bare(tmp_path, autoencoder(width=384, heads=6, decoder_heads=3))
    sizes = {"num_frames": 4, "image_size": 16}
    with pytest.raises(ValueError, match=rf"{file} .*width=384\b.*\bnum_heads=… \(the published model .* has 6\)"):
        MaskedAutoencoder.from_published(file, **sizes)
    with pytest.raises(
        ValueError, match=rf"{file} .*width=192\b.*decoder_num_heads=… \(the published model .* has 3\)"
    ):
        MaskedAutoencoder.from_published(file, **sizes, num_heads=6)
    read = MaskedAutoencoder.from_published(file, **sizes, num_heads=12, decoder_num_heads=2)
    assert (read.encoder.num_heads, read.decoder_num_heads) == (12, 2)


@pytest.mark.parametrize(
    ("published", "width", "heads"),
    [
        (vit.PUBLISHED_HEADS, 768, 12),
        (vit.PUBLISHED_HEADS, 1408, 16),
        (jepa.PUBLISHED_HEADS, 1408, 22),
        (world_model.PUBLISHED_HEADS, 1408, 22),
        (dinov2.PUBLISHED_HEADS, 1536, 24),
    ],
)
def test_hint_is_that_of_the_architecture(published: dict[int, str], width: int, heads: int):
    """V-JEPA 2's ViT-g has 22 heads, that of VideoMAE V2 of the same width 16."""
    with pytest.raises(ValueError, match=rf"num_heads=… \(the published model of this width has {heads}\b"):
        num_heads_of({}, None, width, "file", published)


def test_config_and_argument_must_agree(tmp_path: Path):
    model = autoencoder()
    model.save_published(tmp_path / "folder")
    file = of_a_run(tmp_path, model, heads=3)
    for weights in (tmp_path / "folder", tmp_path / "folder" / "model.safetensors", file):
        size = {"num_frames": 4, "image_size": 16}
        read = MaskedAutoencoder.from_published(weights, **size)
        assert (read.encoder.num_heads, read.decoder_num_heads) == (3, 2)
        assert MaskedAutoencoder.from_published(weights, **size, num_heads=3).encoder.num_heads == 3
        with pytest.raises(ValueError, match=r"\bnum_heads=6 contradicts num_attention_heads=3"):
            MaskedAutoencoder.from_published(weights, **size, num_heads=6)
        with pytest.raises(ValueError, match=r"decoder_num_heads=3 contradicts decoder_num_attention_heads=2"):
            MaskedAutoencoder.from_published(weights, **size, decoder_num_heads=3)


def test_eps_is_that_of_the_config(tmp_path: Path):
    """transformers' VideoMAE has ``layer_norm_eps=1e-12`` by default, the original code 1e-6."""
    model = autoencoder()
    model.save_published(tmp_path / "folder")
    assert MaskedAutoencoder.from_published(tmp_path / "folder").encoder.norm_eps == 1e-6
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-12}))
    read = MaskedAutoencoder.from_published(tmp_path / "folder")
    norms = [module.eps for module in read.encoder.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert norms == [1e-12] * 3
    assert read.config()["layer_norm_eps"] == 1e-12
    assert "norm_eps=1e-06 of this model, 1e-12 in its config" in model.encoder.load_published(tmp_path / "folder")


def test_report_names_the_number_of_heads_and_its_origin(tmp_path: Path):
    model = autoencoder()
    own = "num_attention_heads=3 of this model"
    report = model.load_published(bare(tmp_path, model))
    assert own in report
    assert "decoder_num_attention_heads=2 of this model" in report
    assert own in model.encoder.load_published(bare(tmp_path, model))
    model.save_published(tmp_path / "folder")
    assert "; num_attention_heads=3 as in its config" in model.load_published(tmp_path / "folder")
    assert "; num_attention_heads=3 as in its config" in model.load_published(of_a_run(tmp_path, model, heads=3))


def test_run_with_a_different_number_of_heads_raises(tmp_path: Path):
    file = of_a_run(tmp_path, autoencoder(heads=3), heads=3)
    for model in (autoencoder(heads=6), autoencoder(heads=6).encoder):
        with pytest.raises(ValueError, match=rf"{file} .*num_attention_heads=3 \(here 6\)"):
            model.load_published(file)


def test_a_file_in_the_working_directory_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = autoencoder()
    bare(tmp_path, model)
    file = of_a_run(tmp_path, model, 3)
    monkeypatch.chdir(tmp_path)
    autoencoder().load_published("bare.pth")
    monkeypatch.chdir(file.parent)
    autoencoder().load_published(file.name)
    # the config of the run is found from its own folder too
    with pytest.raises(ValueError, match=r"num_attention_heads=3\b.*4"):
        autoencoder(heads=4).load_published(file.name)
