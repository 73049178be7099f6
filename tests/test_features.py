"""Features of videos: rows of the levels, windows, formats, folders, broken files, killed commands, command line."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import VideoMAEConfig, VideoMAEModel

from blueberry_video import features as entry
from blueberry_video import load_encoder
from blueberry_video.cli import translate
from blueberry_video.data.write import write_video
from blueberry_video.features import features
from blueberry_video.inference.feature_files import FORMATS, read_features
from blueberry_video.inference.video_files import video_names
from trained_classifier import trained


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "num_frames": 4, "hidden_size": 48, "num_hidden_layers": 1}
    folder = tmp_path_factory.mktemp("weights")
    VideoMAEModel(VideoMAEConfig(**sizes, num_attention_heads=4, intermediate_size=64)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number, name in enumerate(("a/1.mp4", "a/2.mp4", "b.mp4")):
        (folder / name).parent.mkdir(exist_ok=True)
        frames = np.random.default_rng(number).integers(0, 255, (20, 24, 40, 3), dtype=np.uint8)
        write_video(folder / name, frames, 10.0)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("level", ["clip", "frame", "token"])
def test_rows_of_a_level(weights: Path, videos: Path, tmp_path: Path, level: str):
    model = load_encoder(weights)
    assert features(weights, [videos], tmp_path, level) == ([], 3)
    assert sorted(files(tmp_path)) == ["a/1.safetensors", "a/2.safetensors", "b.safetensors", "features.json"]
    for name in ("a/1", "a/2", "b"):
        rows = read_features(tmp_path / f"{name}.safetensors")
        tokens = model.features(videos / f"{name}.mp4")[0].cpu().unflatten(0, (2, 2, 2))
        times = model.read(videos / f"{name}.mp4")[0].timestamps.view(2, 2).mean(dim=1).numpy()
        expected = {"clip": tokens.mean((0, 1, 2))[None], "frame": tokens.mean((1, 2)), "token": tokens.flatten(0, 2)}
        np.testing.assert_allclose(rows["features"], expected[level].numpy(), rtol=0, atol=1e-6)
        assert rows["features"].dtype == np.float32
        assert (rows["start"].tolist(), rows["end"].tolist()) == ([0.0] * len(rows["start"]), [2.0] * len(rows["end"]))
        assert rows["missing"].tolist() == [0] * len(rows["missing"])
        if level == "frame":
            assert rows["seconds"].tolist() == times.tolist()
        if level == "token":
            assert rows["seconds"].tolist() == times.repeat(4).tolist()
            places = list(zip(*(rows[key].tolist() for key in "thw"), strict=True))
            assert places == [(t, h, w) for t in range(2) for h in range(2) for w in range(2)]


def test_windows_of_a_video(weights: Path, videos: Path, tmp_path: Path):
    model = load_encoder(weights)
    features(weights, [videos / "b.mp4"], tmp_path, "frame", window=0.8, step=0.6)
    rows = read_features(tmp_path / "b.safetensors")
    starts = [0.0, 0.6, 1.2]
    assert rows["start"].tolist() == pytest.approx(np.repeat(starts, 2).tolist())
    assert rows["end"].tolist() == pytest.approx(np.repeat([start + 0.8 for start in starts], 2).tolist())
    assert ((rows["start"] <= rows["seconds"]) & (rows["seconds"] <= rows["end"])).all()
    for number, start in enumerate(starts):
        tokens = model.encode(model.read(videos / "b.mp4", start, start + 0.8))[0].cpu()
        expected = tokens.unflatten(0, (2, 4)).mean(dim=1).numpy()
        np.testing.assert_allclose(rows["features"][2 * number : 2 * number + 2], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("file_format", FORMATS)
def test_formats_hold_the_same_rows(weights: Path, videos: Path, tmp_path: Path, file_format: str):
    if file_format == "parquet":
        pytest.importorskip("pyarrow")
    features(weights, [videos / "b.mp4"], tmp_path / "a", "token", window=1.0)
    features(weights, [videos / "b.mp4"], tmp_path / "b", "token", file_format, window=1.0)
    expected, found = (
        read_features(tmp_path / "a" / "b.safetensors"),
        read_features(tmp_path / "b" / f"b.{file_format}"),
    )
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)
    whole = files(tmp_path / "b")
    features(weights, [videos / "b.mp4"], tmp_path / "b", "token", file_format, window=1.0, overwrite=True)
    assert files(tmp_path / "b") == whole


def test_a_killed_command_continues_to_the_same_files(weights: Path, videos: Path, tmp_path: Path, monkeypatch):
    features(weights, [videos], tmp_path / "whole")
    computed = []

    def killed(model, video, *arguments):
        computed.append(video)
        if len(computed) == 3:
            raise KeyboardInterrupt
        return rows_of(model, video, *arguments)

    rows_of = entry.rows_of
    monkeypatch.setattr(entry, "rows_of", killed)
    with pytest.raises(KeyboardInterrupt):
        features(weights, [videos], tmp_path / "part")
    assert len(files(tmp_path / "part")) == 3
    features(weights, [videos], tmp_path / "part")
    assert computed == [str(videos / name) for name in ("a/1.mp4", "a/2.mp4", "b.mp4", "b.mp4")]
    assert files(tmp_path / "part") == files(tmp_path / "whole")


def test_features_of_other_settings_are_not_mixed(weights: Path, videos: Path, tmp_path: Path):
    features(weights, [videos], tmp_path)
    with pytest.raises(FileExistsError, match=r"--out=.*level=clip instead of frame.*--overwrite"):
        features(weights, [videos], tmp_path, "frame")
    assert json.loads((tmp_path / "features.json").read_text())["weights"] == str(weights)
    features(weights, [videos / "b.mp4"], tmp_path, "frame", "npz", overwrite=True)
    assert sorted(files(tmp_path)) == ["b.npz", "features.json"]


def test_broken_videos_are_reported_and_the_others_done(
    weights: Path, videos: Path, tmp_path: Path, monkeypatch, capsys
):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in ("1.mp4", "3.mp4"):
        (folder / name).write_bytes((videos / "b.mp4").read_bytes())
    (folder / "2.mp4").write_bytes(b"nothing" * 100)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["features", str(weights), str(folder), "--out", str(out)])
    with pytest.raises(ValueError, match=r"1 of 3 videos.*2\.mp4: ") as raised:
        entry.main()
    assert "\n" not in str(raised.value)
    assert sorted(files(out)) == ["1.safetensors", "3.safetensors", "features.json"]
    assert "2 videos" in capsys.readouterr().out


def test_features_of_a_run(tmp_path: Path):
    run = trained(tmp_path)
    folder = tmp_path / "videos" / "val"
    assert features(run, [folder], tmp_path / "out", "token") == ([], 4)
    tokens = load_encoder(run).features(folder / "dark" / "1.mp4")[0].cpu().numpy()
    np.testing.assert_allclose(
        read_features(tmp_path / "out" / "dark" / "1.safetensors")["features"], tokens, atol=1e-6
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": "video"}, r"--level=video.*clip, frame, token"),
        ({"format": "csv"}, r"--format=csv.*safetensors, npz, parquet"),
        ({"window": 0.0}, r"--window=0\.0"),
        ({"step": 1.0}, r"--step=1\.0.*--window"),
        ({"num_heads": 3}, r"num_heads=3 contradicts num_attention_heads=4"),
    ],
)
def test_wrong_arguments_raise(weights: Path, videos: Path, tmp_path: Path, arguments, message):
    with pytest.raises(ValueError, match=message):
        features(weights, [videos], tmp_path / "out", **arguments)
    assert not (tmp_path / "out" / "features.json").exists()


def test_videos_with_the_same_file_are_refused(weights: Path, videos: Path, tmp_path: Path):
    (tmp_path / "1.mp4").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a/1\.mp4 and .*1\.mp4 would have the same file"):
        features(weights, [videos / "a" / "1.mp4", tmp_path / "1.mp4"], tmp_path / "out")


def test_names_of_outputs(tmp_path: Path):
    for name in ("a/1.mp4", "2.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "list.txt").write_text(f"a/1.mp4\n../x/3.mp4\n{tmp_path}/2.mp4\nhttps://x.org/v/4.mp4?k=1\n")
    assert list(video_names([tmp_path]).values()) == ["2.mp4", "a/1.mp4"]
    assert list(video_names([tmp_path / "a" / "1.mp4"]).values()) == ["1.mp4"]
    assert list(video_names([tmp_path / "list.txt"]).values()) == ["a/1.mp4", "3.mp4", "2.mp4", "4.mp4"]


def test_first_argument_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pth").write_bytes(b"x")
    for given, expected in (
        ("my_idea", "outputs/my_idea"),
        ("outputs/my_idea/run", "outputs/my_idea/run"),
        ("weights.pth", "weights.pth"),
        ("hf://org/name@v1", "hf://org/name@v1"),
        ("org/name", "org/name"),
    ):
        assert translate(["features", given, "v.mp4"]) == ["blueberry_video.features", expected, "v.mp4"]
    assert translate(["features", "--help"]) == ["blueberry_video.features", "--help"]
