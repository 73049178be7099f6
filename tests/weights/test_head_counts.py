"""Number of attention heads of loaded weights, which no tensor determines: from a config or the caller, or printed."""

from pathlib import Path

import pytest
import torch
import yaml

from blueberry_video.models.masked_autoencoder.model import MaskedAutoencoder
from blueberry_video.models.vit import VisionTransformer


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


def test_number_of_heads_of_the_published_model_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture):
    file = bare(tmp_path, autoencoder(width=384, heads=6, decoder_heads=3))
    read = MaskedAutoencoder.from_published(file, num_frames=4, image_size=16)
    assert (read.encoder.num_heads, read.decoder_num_heads) == (6, 3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["num_heads=6", "decoder_num_heads=3"]
    assert all(str(file) in line for line in lines)
    MaskedAutoencoder.from_published(file, num_frames=4, image_size=16, num_heads=6, decoder_num_heads=3)
    assert capsys.readouterr().out == ""


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
