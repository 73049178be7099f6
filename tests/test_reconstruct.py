"""Reconstructions of videos by trained runs: panels, PSNR, killed commands, errors."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from blueberry_video import load_run, train
from blueberry_video import reconstruct as entry
from blueberry_video.config import compose
from blueberry_video.data.write import write_video
from blueberry_video.experiment.run_folder import RunFolder
from blueberry_video.reconstruct import reconstruct
from blueberry_video.tasks.prediction import predict
from blueberry_video.video import load_clip
from blueberry_video.video.sampling import SamplingOptions

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
TINY = ["logger=csv", "callbacks.progress=null", "callbacks.media=null", "trainer.max_steps=1", "schedule=constant"]
TINY += ["data.train.size=4", "data.val.size=2", "data.batch_size=2", "data.num_workers=0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of a masked autoencoder and of a video VAE, of one step."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for name in ("template", "video_vae"):
        config = compose(EXPERIMENTS / name / "config.yaml", [*TINY, f"output_dir={folder}"])
        train.run(config)
        torch.use_deterministic_algorithms(False)
        found[name] = RunFolder.open(folder / name).path
    return found


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for name in ("a", "b"):
        write_video(folder / f"{name}.mp4", rng.integers(0, 256, (20, 32, 48, 3), dtype=np.uint8), 10.0)
    return folder


def read(file: Path) -> torch.Tensor:
    return load_clip(file, SamplingOptions(sampling="all", frame_factor=1)).pixels


def test_masked_autoencoder_shows_input_visible_patches_and_reconstruction(runs, videos: Path, tmp_path: Path):
    found = reconstruct(runs["template"], [videos], tmp_path)
    assert [Path(video).name for video in found] == ["a.mp4", "b.mp4"]
    model = load_run(runs["template"])
    side = model.clips.height
    for video, row in found.items():
        written = read(tmp_path / row["file"])
        assert written.shape == (row["frames"], 3, side, 3 * side)
        clip = model.read(video)[0].pixels
        assert (written[..., :side].float() - clip).abs().mean() < 40  # noise, whose chroma has half the resolution
        batch = model.batch(model.read(video), [video])
        outputs = predict(model.task, batch)
        hidden = outputs["visible"] == 0
        assert 0.5 < float(hidden.float().mean()) < 0.95
        error = (outputs["reconstruction"] - batch["video"]).square()
        assert row["psnr"] == pytest.approx(-10 * float(error.mean().log10()), abs=1e-3)
        assert row["psnr_masked"] == pytest.approx(-10 * float(error[hidden].mean().log10()), abs=1e-3)
        assert row["psnr_masked"] < row["psnr"]
        black = (outputs["visible"][0, :, 0] == 0)[..., :side]
        middle = written[0, :, :, side : 2 * side].float()
        assert middle[black].mean() < 0.3 * middle[~black].mean()
    content = json.loads((tmp_path / "quality.json").read_text())
    assert content["videos"] == found


def test_autoencoder_and_reconstruction_alone(runs, videos: Path, tmp_path: Path):
    found = reconstruct(runs["video_vae"], [videos / "a.mp4"], tmp_path, only=True, start=0.5)
    row = found[str(videos / "a.mp4")]
    assert read(tmp_path / row["file"]).shape == (17, 3, 32, 32)
    panels, fps, again = load_run(runs["video_vae"]).reconstruct(videos / "a.mp4", 0.5)
    assert len(panels) == 2
    assert again["psnr"] == pytest.approx(row["psnr"])
    assert "psnr_masked" not in row
    assert fps == pytest.approx(16 / 1.4, rel=1e-3)  # 17 frames of the last 1.4 seconds


def test_repeated_command_keeps_complete_videos(runs, videos: Path, tmp_path: Path, monkeypatch, capsys):
    run = runs["video_vae"]
    first = reconstruct(run, [videos / "a.mp4"], tmp_path)
    before = (tmp_path / "0000_a.mp4").stat().st_mtime_ns
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    sources = [videos / "a.mp4", tmp_path / "broken.mp4", videos / "b.mp4"]
    monkeypatch.setattr(sys, "argv", ["reconstruct", str(run), *map(str, sources), "--out", str(tmp_path)])
    with pytest.raises(ValueError, match=r"1 of 3 videos have no reconstruction, such as .*broken\.mp4"):
        entry.main()
    assert "reconstruct: 3 of 3 videos" in capsys.readouterr().err
    assert (tmp_path / "0000_a.mp4").stat().st_mtime_ns == before
    rows = json.loads((tmp_path / "quality.json").read_text())["videos"]
    assert rows[str(videos / "a.mp4")] == first[str(videos / "a.mp4")]
    assert rows[str(videos / "b.mp4")]["file"] == "0002_b.mp4"
    with pytest.raises(FileExistsError, match=r"quality\.json .*only is False and would be True.*--overwrite"):
        reconstruct(run, [videos], tmp_path, only=True)


def test_run_that_does_not_reconstruct_raises(runs, videos: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("blueberry_video.tasks.prediction.RECONSTRUCTS", ())  # of a classifier
    with pytest.raises(ValueError, match=r"trained a Autoencoding"):
        reconstruct(runs["video_vae"], [videos], tmp_path)
