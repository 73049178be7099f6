"""Evaluation of trained runs: equal to training's validation, other splits and data, files of the run."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra.errors import InstantiationException

from blueberry_video import evaluate as entry
from blueberry_video.data.write import write_video
from blueberry_video.evaluate import evaluate
from trained_classifier import trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("run"))


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file() and "evaluations" not in file.parts)
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_metrics_are_those_of_training(run: Path, tmp_path: Path):
    before = digests(run)
    record, file = evaluate(run, out=tmp_path / "numbers.json")
    assert json.loads(file.read_text()) == record
    trained_metrics = json.loads((run / "run.json").read_text())["metrics"]
    own = {name: value for name, value in trained_metrics.items() if name.startswith("val/")}
    assert record["metrics"] == pytest.approx(own)
    assert record["clips"] == 4
    assert (tmp_path / "confusion_class_numbers.png").is_file()
    classes = (tmp_path / "classes_class_numbers.csv").read_text()
    assert classes == (run / "media" / "classes_class_val.csv").read_text()
    assert digests(run) == before
    with pytest.raises(FileExistsError, match=r"numbers\.json.*overwrite"):
        evaluate(run, out=tmp_path / "numbers.json")


def test_another_split_and_another_folder(run: Path, tmp_path: Path, monkeypatch, capsys):
    """Another folder with one of the classes, which keeps its index."""
    record, file = evaluate(run, split="train")
    assert record["split"] == "train"
    assert file.parent == run / "evaluations"
    rng = np.random.default_rng(0)
    for number in range(3):
        target = tmp_path / "other" / "val" / "dark" / f"{number}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_video(target, rng.integers(20, 80, (20, 24, 40, 3), dtype=np.uint8), 10.0)
    words = [str(run), f"data.val.root={tmp_path / 'other'}", "--out", str(tmp_path / "other.json")]
    monkeypatch.setattr(sys, "argv", ["evaluate", *words])
    entry.main()
    metrics = json.loads((tmp_path / "other.json").read_text())["metrics"]
    assert "val/class" in capsys.readouterr().out
    reference = json.loads((run / "run.json").read_text())["metrics"]
    assert metrics["val/class_trivial"] == 1.0
    if reference["val/class"] == 1.0:  # the trained classifier tells dark from bright
        assert metrics["val/class"] == 1.0
    (tmp_path / "other" / "val" / "blue").mkdir()
    shutil.copy(target, tmp_path / "other" / "val" / "blue" / "0.mp4")
    with pytest.raises(Exception, match="blue"):
        evaluate(run, [f"data.val.root={tmp_path / 'other'}"])


def test_the_training_set_may_be_gone(run: Path, tmp_path: Path, capsys):
    moved = shutil.copytree(run, tmp_path / "run")
    videos = run.parents[2] / "videos"
    (moved / "config.yaml").write_text((moved / "config.yaml").read_text().replace(str(videos), "/nowhere"))
    record, _ = evaluate(moved, [f"data.val.root={videos}"])
    assert record["metrics"] == pytest.approx(evaluate(run)[0]["metrics"])
    assert "data.train is missing" in capsys.readouterr().err


def test_classes_in_another_order_raise(run: Path, tmp_path: Path):
    """Also where the training set, which numbers them, is on another machine."""
    moved, videos = shutil.copytree(run, tmp_path / "run"), run.parents[2] / "videos"
    (moved / "config.yaml").write_text((moved / "config.yaml").read_text().replace(str(videos), "/nowhere"))
    changes = [f"data.val.root={videos}", "+data.val.classes={class: [dark, bright]}"]
    for folder in (run, moved):
        with pytest.raises(ValueError, match=r"'dark' as class 0 of class.*'bright'"):
            evaluate(folder, changes)


def test_other_keys_raise(run: Path):
    with pytest.raises(ValueError, match=r"model\.head_norm=false.*data"):
        evaluate(run, ["model.head_norm=false"])
    with pytest.raises(InstantiationException, match="/missing"):
        evaluate(run, ["data.val.root=/missing"])
