"""Trained runs as models: clips as in validation, outputs, names of classes, runs without a record of their clips."""

import json
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from blueberry_video import load_run
from blueberry_video.experiment.trained import load_trained
from blueberry_video.video.errors import VideoError
from trained_classifier import trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("run"))


def test_clips_are_those_of_validation(run: Path):
    model = load_run(run, "cpu")
    data = load_trained(run).data
    for row, clip in zip(data.val.rows, (data.val[i] for i in range(len(data.val)))):
        [frames] = model.read(row.path)
        assert torch.equal(frames.pixels, clip["video"])
        expected = model.task.model(model.task.normalize(clip["video"].transpose(0, 1)[None].float() / 255))
        torch.testing.assert_close(model(row.path)["class"], expected["class"].softmax(-1))
    paths = [row.path for row in data.val.rows]
    together = model(*paths)["class"]
    torch.testing.assert_close(together, torch.cat([model(path)["class"] for path in paths]))
    pixels = np.zeros((9, 24, 40, 3), np.uint8)  # shorter than the files, of another source
    assert model(pixels)["class"].shape == (1, 2)
    assert model.features(pixels).shape == (1, 8, 16)


def test_names_of_classes_are_recorded(run: Path):
    model = load_run(run, "cpu")
    assert model.classes == {"class": ("bright", "dark")}
    file = run.parents[2] / "videos" / "val" / "dark" / "1.mp4"
    probabilities = model(file)["class"][0].tolist()
    named = model.predict(file)
    assert named == {"class": pytest.approx(dict(zip(("bright", "dark"), probabilities)))}
    assert list(named["class"].values()) == sorted(named["class"].values(), reverse=True)


def test_the_data_may_be_gone(run: Path, tmp_path: Path):
    moved = tmp_path / "shared" / run.name
    shutil.copytree(run, moved)
    text = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(text.replace(str(run.parents[2] / "videos"), "/nowhere"))
    file = run.parents[2] / "videos" / "val" / "dark" / "1.mp4"
    torch.testing.assert_close(load_run(moved, "cpu")(file)["class"], load_run(run, "cpu")(file)["class"])
    record = json.loads((moved / "run.json").read_text())
    del record["clips"]  # a run of an earlier version
    (moved / "run.json").write_text(json.dumps(record))
    with pytest.raises(Exception, match="/nowhere"):
        load_run(moved, "cpu")
    (moved / "config.yaml").write_text(text)
    old, new = (json.dumps(asdict(load_run(each, "cpu").clips)) for each in (moved, run))
    assert old == new


def test_views_of_validation_are_averaged(tmp_path: Path):
    run = trained(tmp_path, "data.val.sampler=multi_clip", "data.val.num_clips=3", "data.val.stride=2")
    model, file = load_run(run, "cpu"), tmp_path / "videos" / "val" / "dark" / "1.mp4"
    views = model.read(file, views=None)
    assert [view.indices for view in views] == [(0, 2, 4, 6), (6, 8, 10, 12), (13, 15, 17, 19)]
    each = torch.cat([model(view.pixels)["class"] for view in views])
    outputs = (
        model.task.model(model.task.normalize(model.batch(views, ["a"] * 3)["video"]))["class"].detach().softmax(-1)
    )
    expected = outputs.double().mean(dim=0)
    assert model.predict(file)["class"]["dark"] == pytest.approx(float(expected[1]), abs=1e-6)
    assert each.shape == (3, 2)
    assert model.read(file)[0].indices == (6, 8, 10, 12)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_options_of_the_data_are_recorded(tmp_path: Path):
    """Files of 20:11 pixels without antialiasing, as validation reads them."""
    options = ["data.val.antialias=false", "+data.val.square_pixels=true", "+data.val.deinterlace=yadif"]
    run = trained(tmp_path, *options)
    wide = tmp_path / "wide.mkv"
    command = [
        "ffmpeg",
        "-v",
        "error",
        "-i",
        str(tmp_path / "videos" / "val" / "dark" / "1.mp4"),
        "-vf",
        "setsar=20/11",
    ]
    subprocess.run([*command, "-c:v", "ffv1", str(wide)], check=True)
    model, data = load_run(run, "cpu"), load_trained(run).data.val
    assert (model.clips.resize["antialias"], model.clips.resize["square_pixels"]) == (False, True)
    assert model.clips.decoding == {"tone_map": "none", "deinterlace": "yadif"}
    expected = data._load(replace(data.rows[0], path=wide, name="wide.mkv"), 0, 0).pixels
    assert torch.equal(model.read(wide)[0].pixels, expected)
    plain = load_run(trained(tmp_path / "plain"), "cpu").read(wide)[0].pixels
    assert not torch.equal(plain, expected)


def test_a_range_of_seconds_is_sampled(run: Path):
    model, file = load_run(run, "cpu"), run.parents[2] / "videos" / "val" / "dark" / "1.mp4"
    [frames] = model.read(file, start=0.5, end=1.05)
    assert frames.indices[0] == 5
    assert frames.indices[-1] == 10
    assert model.predict(file, 0.5, 1.05) != model.predict(file)
    with pytest.raises(ValueError, match="start"):
        model.read(file, start=5.0)


def test_a_file_that_is_no_video_raises(run: Path, tmp_path: Path):
    (tmp_path / "broken.mp4").write_bytes(b"nothing" * 100)
    with pytest.raises(VideoError, match=r"broken\.mp4"):
        load_run(run, "cpu")(tmp_path / "broken.mp4")
    with pytest.raises(FileNotFoundError, match="make train"):
        load_run(tmp_path)
