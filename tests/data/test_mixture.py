"""Mixture: indices, shares, labels, caches, and batches from one part."""

import itertools
from pathlib import Path

import pytest
import torch

from blueberry_video.data.clip_cache import CachedClips
from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.mixture import Mixture
from blueberry_video.data.single_frames import SingleFrames
from blueberry_video.data.sprites import Sprites


class Named:
    """Dataset with ids made from its name and the index."""

    def __init__(self, name: str, size: int, **attributes):
        self.name, self.size = name, size
        for key, value in attributes.items():
            setattr(self, key, value)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.size:
            raise IndexError
        return {"id": f"{self.name}{index}"}


def omni(split: str, size: int = 24, images: int = 24) -> Mixture:
    frames = SingleFrames(Sprites(split, images))
    return Mixture({"image": frames, "clip": Sprites(split, size)}, {"image": 1, "clip": 3})


def test_indices_run_through_the_parts():
    mixture = Mixture({"a": Named("a", 3), "b": Named("b", 1), "c": Named("c", 2)})
    assert [mixture[i]["id"] for i in range(len(mixture))] == ["a0", "a1", "a2", "b0", "c0", "c1"]
    assert [mixture.locate(i) for i in (2, 3, 5)] == [("a", 2), ("b", 0), ("c", 1)]
    for index in (-1, 6):
        with pytest.raises(IndexError, match=rf"index {index}\b.*\b6\b"):
            mixture[index]
    assert mixture.part_sizes == {"a": 3, "b": 1, "c": 2}
    assert mixture.shares == pytest.approx({"a": 0.5, "b": 1 / 6, "c": 1 / 3})


def test_shares_are_normalized_in_the_order_of_the_parts():
    mixture = Mixture({"a": Named("a", 3), "b": Named("b", 1)}, {"b": 3, "a": 1})
    assert list(mixture.shares.items()) == [("a", 0.25), ("b", 0.75)]


def test_sample_passes_the_epoch_to_the_part():
    clips = omni("train")
    shown = [clips.sample(5, epoch)["id"] for epoch in range(8)]
    assert len(set(shown)) > 1
    assert clips.sample(5, 0)["id"] == clips[5]["id"] == shown[0]
    assert clips.sample(24, 7)["id"] == "sprites-train-0"
    assert clips.varies_by_epoch
    assert not Mixture({"a": Sprites("train", 4)}).varies_by_epoch


def test_classes_are_the_union_of_the_parts():
    mixture = omni("train")
    assert mixture.classes == Sprites.classes
    assert mixture.reversal_pairs == Sprites.reversal_pairs
    first, second = Named("a", 1, classes={"kind": ("x", "y")}), Named("b", 1, classes={"kind": ("y", "x")})
    with pytest.raises(ValueError, match=r"parts\.p\b.*parts\.q\b.*classes.*'kind'"):
        Mixture({"p": first, "q": second})


@pytest.mark.parametrize(
    ("parts", "shares", "expected"),
    [
        ({}, None, "parts is empty"),
        ({"a": 0}, None, r"parts\.a is empty"),
        ({"a": 2, "b": 2}, {"a": 1}, r"shares\b.* a and parts .*\ba, b\b"),
        ({"a": 2}, {"a": 1, "c": 1}, r"shares\b.* a, c and parts .*\ba\b"),
        ({"a": 2, "b": 2}, {"a": 1, "b": 0}, r"shares\.b=0\b"),
        ({"a": 2}, {"a": float("nan")}, r"shares\.a=nan\b"),
        ({"a": 2}, {"a": float("inf")}, r"shares\.a=inf\b"),
    ],
)
def test_invalid_parts_and_shares_raise(parts: dict, shares: dict | None, expected: str):
    with pytest.raises(ValueError, match=expected):
        Mixture({name: Named(name, size) for name, size in parts.items()}, shares)


def test_mixture_of_mixtures_raises():
    with pytest.raises(ValueError, match=r"parts\.both\b.*Mixture"):
        Mixture({"both": Mixture({"a": Named("a", 2)})})


def test_prepare_and_skipped_file_are_forwarded_to_the_parts(tmp_path: Path):
    cached = CachedClips(Sprites("train", 6), tmp_path, shard_size=4)
    listing = Named("b", 2, skipped_file=None)
    data = DataModule(Mixture({"image": SingleFrames(cached), "b": listing}), Sprites("val", 2), batch_size=2)
    data.prepare_data()
    assert len(list(tmp_path.rglob("*.clips"))) == 2
    data.list_skipped_in("skipped.csv")
    assert listing.skipped_file == data.train.skipped_file == "skipped.csv"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_and_clips_are_in_separate_batches(num_workers: int):
    data = DataModule(omni("train"), omni("val", size=5, images=6), batch_size=4, num_workers=num_workers)
    shapes = [tuple(batch["video"].shape) for batch in data.train_dataloader()]
    assert sorted(shapes) == [(4, 1, 3, 32, 32)] * 3 + [(4, 16, 3, 32, 32)] * 9
    assert len({kind for kind, _ in itertools.groupby(shapes)}) == 2
    shown = list(data.val_dataloader())
    assert [tuple(batch["video"].shape[:2]) for batch in shown] == [(3, 1), (3, 16), (3, 1), (2, 16)]
    ids = [name for batch in shown for name in batch["id"]]
    assert len(set(ids)) == 11
    image = next(batch for batch in shown if batch["video"].shape[1] == 1)
    assert set(image["labels"]) == {"shape", "colour", "size"}
    assert image["video"].dtype == torch.uint8


def test_concatenated_shapes_raise():
    both = torch.utils.data.ConcatDataset([SingleFrames(Sprites("train", 2)), Sprites("train", 2)])
    data = DataModule(both, both, batch_size=4)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\).*Mixture"):
            list(loader)
