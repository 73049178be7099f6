"""Number of classes of a classifier that the data determines."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from tests.trained_classifier import QUIET, trained

from blueberry_video import train
from blueberry_video.config import compose, with_classes
from blueberry_video.experiment.run_folder import RunFolder
from blueberry_video.trained_model import load_run

CLASSES = {"class": ("a", "b", "c"), "speed": ("slow", "fast")}
NUMBERS = {"class": 3, "speed": 2}
SIZES = ["num_frames=4", "image_size=16", "patch_size=8", "embed_dim=16", "depth=1", "num_heads=2"]
DATA = SimpleNamespace(classes=CLASSES)
UNLABELLED = """
defaults:
  - train
  - override model: MODEL
  - override task: TASK
  - override data: sprites
  - _self_
name: heads
"""


def config(folder: Path, model: str, task: str, *overrides: str):
    file = folder / "heads" / "config.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(UNLABELLED.replace("MODEL", model).replace("TASK", task))
    return compose(file, overrides)


@pytest.mark.parametrize("model", ["tiny", "small", "base", "large", "huge", "giant", "probe"])
def test_classifiers_have_the_labels_of_the_data(tmp_path: Path, model: str):
    found = config(tmp_path, f"classifier/{model}", "classification")
    assert found.model.num_classes is None
    assert with_classes(found, DATA).model.num_classes == NUMBERS
    assert found.model.num_classes is None  # the config that was given does not change


def test_other_classifiers_and_absent_keys(tmp_path: Path):
    for model, task in (("frame_classifier/tiny", "frame_classification"), ("anticipator/tiny", "anticipation")):
        assert with_classes(config(tmp_path, model, task), DATA).model.num_classes == NUMBERS
    without = config(tmp_path, "classifier/tiny", "classification")
    del without.model["num_classes"]
    assert with_classes(without, DATA).model.num_classes == NUMBERS


def test_the_teacher_has_the_same_heads(tmp_path: Path):
    teacher = "model@task.teacher=classifier/tiny"
    found = with_classes(config(tmp_path, "classifier/tiny", "distillation", teacher, "task.teacher_from=x.pt"), DATA)
    assert found.task.teacher.num_classes == found.model.num_classes == NUMBERS


def test_numbers_in_the_config_are_kept_without_reading_the_data(tmp_path: Path):
    for model, task in (("classifier/vjepa_probe", "classification"), ("hydra_generator/tiny", "frame_generation")):
        found = config(tmp_path, model, task, *(["data=moving_shapes"] if task == "frame_generation" else []))
        assert with_classes(found, None) is found
    part = config(tmp_path, "classifier/tiny", "classification", "model.num_classes={motion: 8}")
    assert with_classes(part, None).model.num_classes == {"motion": 8}


def test_data_without_labels_and_absent_data_raise(tmp_path: Path):
    found = config(tmp_path, "classifier/tiny", "classification")
    with pytest.raises(ValueError, match=r"`model\.num_classes` = null.*`data\.train`"):
        with_classes(found, SimpleNamespace(classes={}))
    folder = {"_target_": "blueberry_video.data.video_folder.VideoFolder", "root": str(tmp_path / "x"), "num_frames": 4}
    found.data = OmegaConf.create({**found.data, "train": folder})
    with pytest.raises(FileNotFoundError, match=r"(?s)/x.*model\.num_classes=\{class: 10\}"):
        with_classes(found)


def test_run_records_the_numbers_and_is_used_without_its_data(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = trained(tmp_path)
    saved = OmegaConf.load(run / "config.yaml")
    assert saved.model.num_classes == {"class": 2}
    video = next((tmp_path / "videos" / "val" / "bright").iterdir())
    assert set(load_run(run).predict(video)["class"]) == {"bright", "dark"}

    file = tmp_path / "lights" / "config.yaml"
    more = ["trainer.max_steps=3", f"output_dir={tmp_path / 'outputs'}", *QUIET]
    sizes = [f"model.encoder.{size}" for size in SIZES]
    command = SimpleNamespace(file=file, overrides=[*more, "model=classifier/tiny", *sizes, f"resume={run.name}"])
    train.run(compose(file, command.overrides), command)
    assert RunFolder.open(run).record["step"] == 3
    capsys.readouterr()
    train.run(compose(file, [*more, "check=true"]))
    assert "classes    class: 2 (bright, dark)" in capsys.readouterr().out
