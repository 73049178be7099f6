"""Pseudo-labels on disk: written, resumed byte for byte, read without depth; the entry point, and students of a run."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from blueberry_video.data.pseudo_labels import PseudoLabelled, PseudoLabelWriter
from blueberry_video.data.world import World
from blueberry_video.evaluation.student import FirstClips

CONFIG = """
defaults:
  - train
  - override model: vit/tiny
  - override task: depth
  - override data: world_depth
  - override callbacks: student
  - _self_
name: teacher
"""


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
    if stop < 4:
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
