"""Pseudo-labels on disk: written, resumed byte for byte, read without depth; the entry point, and students of a run."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blueberry_video import pseudo_labels, train
from blueberry_video.config import compose
from blueberry_video.data.pseudo_labels import PseudoLabelled, PseudoLabelWriter
from blueberry_video.data.world import World
from blueberry_video.evaluation.student import FirstClips, pseudo_labeller
from blueberry_video.experiment.trained import load_trained
from blueberry_video.tasks.depth import Depth

MODEL = """
  _target_: blueberry_video.models.depth_anything.DepthAnything
  encoder:
    {_target_: blueberry_video.models.dinov2.DINOv2, image_size: 28, num_frames: 2, embed_dim: 16, depth: 4,
     num_heads: 2, table_size: 2}
  taps: [0, 1, 2, 3]
  features: 8
  out_channels: [4, 6, 8, 10]
"""
TEACHER = f"""
defaults:
  - train
  - override task: depth_student
  - override data: world_depth
  - override callbacks: student
  - _self_
name: teacher
model: {MODEL}
data:
  batch_size: 4
  train: {{dataset: {{size: 12, supersample: 1}}}}
  val: {{dataset: {{size: 6}}}}
callbacks:
  student: {{num_clips: 8, steps: 6}}
"""
STUDENT = f"""
defaults:
  - train
  - override task: depth_student
  - override data: world_depth
  - _self_
name: student
model: {MODEL}
data:
  batch_size: 4
  train:
    _target_: blueberry_video.data.pseudo_labels.PseudoLabelled
    folder: labels
    dataset: {{size: 9, _target_: blueberry_video.data.world.World, num_frames: 2, image_size: 28, supersample: 1}}
  val: {{dataset: {{size: 6, num_frames: 2, camera: static, supersample: 1}}}}
"""
QUIET = ["logger=csv", "callbacks.progress=null", "callbacks.media=null", "schedule=constant", "optimizer.lr=0.001"]


def world(size: int = 5, split: str = "train", **changes) -> World:
    return World(split, size, **{"num_frames": 2, "image_size": 14, "supersample": 1, **changes})


def brightness(video: Tensor) -> Tensor:
    return video.float().mean(1)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("float16", 1e-3)])
def test_labelled_clips_have_the_disparity_of_the_teacher_and_no_depth(tmp_path: Path, dtype, tolerance: float):
    data = world()
    labelled = PseudoLabelWriter(2, dtype)(data, brightness, tmp_path, "mean")
    assert len(labelled) == 5
    for index in range(5):
        clip, found = data[index], labelled[index]
        assert set(found) == (set(clip) - {"depth"}) | {"disparity"}
        assert found["disparity"].dtype == torch.float32
        torch.testing.assert_close(found["disparity"], brightness(clip["video"]), rtol=tolerance, atol=0)
        assert torch.equal(found["video"], clip["video"])
    assert labelled.made_of["teacher"] == "mean"
    assert labelled.classes == data.classes
    again = PseudoLabelled(data, tmp_path)
    assert again.cache_key == labelled.cache_key
    assert torch.equal(again[3]["disparity"], labelled[3]["disparity"])
    with pytest.raises(IndexError):
        again[5]


@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_an_interrupted_writer_continues_byte_for_byte(tmp_path: Path, stop: int):
    PseudoLabelWriter(2)(world(), brightness, tmp_path / "whole", "mean")
    calls = []

    def dies(video: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return brightness(video)

    with pytest.raises(KeyboardInterrupt):
        PseudoLabelWriter(2)(world(), dies, tmp_path / "cut", "mean")
    with pytest.raises(ValueError, match=rf"contains {stop // 2} of 3 shards.*make pseudo_labels"):
        PseudoLabelled(world(), tmp_path / "cut")
    calls.clear()
    stop = 100
    PseudoLabelWriter(2)(world(), dies, tmp_path / "cut", "mean")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert len(calls) < 6
    calls.clear()
    PseudoLabelWriter(2)(world(), dies, tmp_path / "cut", "mean")
    assert not calls


def test_labels_of_other_clips_raise(tmp_path: Path):
    PseudoLabelWriter()(world(), brightness, tmp_path, "mean")
    with pytest.raises(ValueError, match=r"data='world-1/train/2x14.*data='world-1/val"):
        PseudoLabelled(world(split="val"), tmp_path)
    with pytest.raises(ValueError, match=r"size=5\b.*size=4\b"):
        PseudoLabelled(world(4), tmp_path)
    with pytest.raises(ValueError, match=r"teacher was mean and is other"):
        PseudoLabelWriter()(world(), brightness, tmp_path, "other")
    with pytest.raises(FileNotFoundError, match=r"missing/manifest\.json.*make pseudo_labels"):
        PseudoLabelled(world(), tmp_path / "missing")
    shard = tmp_path / "00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"00000\.safetensors.*damaged.*make pseudo_labels"):
        PseudoLabelled(world(), tmp_path)[0]


def test_a_clip_that_has_become_another_raises(tmp_path: Path):
    class Renamed(World):
        def __getitem__(self, index: int) -> dict:
            return {**super().__getitem__(index), "id": "other"}

    PseudoLabelWriter()(world(), brightness, tmp_path, "mean")
    changed = Renamed("train", 5, 2, 14, supersample=1)
    with pytest.raises(ValueError, match=r"clip 2 is 'other'.*'world-train-2'"):
        PseudoLabelled(changed, tmp_path)[2]


@pytest.mark.parametrize(
    ("predict", "match"),
    [
        (lambda video: video[0, 0].float(), r"'world-train-0'.*\(14, 14\).*\(2, 14, 14\)"),
        (lambda video: brightness(video) * torch.nan, r"disparity.*'world-train-0'.*NaN"),
    ],
)
def test_bad_predictions_raise(tmp_path: Path, predict, match: str):
    with pytest.raises(ValueError, match=match):
        PseudoLabelWriter()(world(), predict, tmp_path, "mean")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"dtype": "int8"}, r"dtype='int8'"), ({"shard_size": 0}, r"shard_size=0\b"), ({"num_workers": -1}, r"=-1\b")],
)
def test_bad_settings_raise(arguments: dict, match: str):
    with pytest.raises(ValueError, match=match):
        PseudoLabelWriter(**arguments)


def test_first_clips(tmp_path: Path):
    first = FirstClips(world(), 2)
    labelled = PseudoLabelWriter()(first, brightness, tmp_path, "mean")
    assert [clip["id"] for clip in (labelled[0], labelled[1])] == ["world-train-0", "world-train-1"]
    assert FirstClips(world(), 3).cache_key != first.cache_key


# ---- runs ------------------------------------------------------------------------------------------------------------


def config_of(folder: Path, text: str, *overrides: str):
    file = folder / text.split("name: ")[1].split("\n")[0] / "config.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return compose(file, [*QUIET, f"output_dir={folder / 'outputs'}", *overrides])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a teacher that was trained for a few steps, with the callback of the student."""
    folder = tmp_path_factory.mktemp("runs")
    folders = [f"data.{split}.folder={folder / 'cache'}" for split in ("train", "val")]
    train.run(config_of(folder, TEACHER, "trainer.max_steps=8", *folders))
    torch.use_deterministic_algorithms(False)
    [run] = (path for path in (folder / "outputs" / "teacher").iterdir() if (path / "run.json").is_file())
    return run


def test_a_student_is_trained_at_the_end_of_the_run(teacher: Path):
    results = json.loads((teacher / "end_of_run.json").read_text())["results"]
    found = results["student"]
    assert set(found) == {"abs_rel_student", "abs_rel_teacher", "abs_rel_student_ratio"}
    assert found["abs_rel_teacher"] == pytest.approx(results["trainer.validate"]["val/abs_rel"], rel=1e-4)
    assert found["abs_rel_student_ratio"] == pytest.approx(found["abs_rel_student"] / found["abs_rel_teacher"])
    assert found["abs_rel_student"] != found["abs_rel_teacher"]
    assert not (teacher / "pseudo_labels").exists()
    metrics = json.loads((teacher / "run.json").read_text())["metrics"]
    assert metrics["student/abs_rel_student"] == pytest.approx(found["abs_rel_student"])


def test_the_entry_point_labels_the_clips_of_an_experiment(teacher: Path, tmp_path: Path):
    config = config_of(tmp_path, STUDENT, f"data.train.folder={tmp_path / 'labels'}")
    labelled = pseudo_labels.run(teacher, config, shard_size=4)
    assert labelled.labels.folder == tmp_path / "labels"
    task = load_trained(teacher, (Depth,)).task
    for index in (0, 8):
        clip = labelled[index]
        assert "depth" not in clip
        maps = task.predict(clip["video"][None].transpose(1, 2).float() / 255)[0]
        torch.testing.assert_close(clip["disparity"], maps.detach())
    assert torch.equal(pseudo_labeller(task)(labelled[0]["video"]), labelled[0]["disparity"])
    whole = files(tmp_path / "labels")
    other = pseudo_labels.run(teacher, config, out=tmp_path / "other", shard_size=4)
    assert files(other.labels.folder) == whole
    train.run(config_of(tmp_path, STUDENT, f"data.train.folder={tmp_path / 'labels'}", "trainer.max_steps=2"))
    torch.use_deterministic_algorithms(False)


def test_a_metric_teacher_raises(teacher: Path):
    task = load_trained(teacher, (Depth,)).task
    task.model.max_depth = 20.0
    with pytest.raises(ValueError, match=r"model\.max_depth=20\.0"):
        pseudo_labeller(task)


def test_no_teacher_on_the_command_line_raises(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["pseudo_labels", "--config-dir", "experiments/x"])
    with pytest.raises(ValueError, match=r"--config-dir.*outputs/"):
        pseudo_labels.main()
