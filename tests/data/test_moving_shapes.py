"""Moving shapes: pixels match the labels, held-out clips are new, and the known losses are exact."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from blueberry_video.data.clip_cache import CachedClips
from blueberry_video.data.moving_shapes import COLOURS, DIRECTIONS, SHAPES, MovingShapes


def batch(dataset: MovingShapes) -> dict:
    return default_collate([dataset[i] for i in range(len(dataset))])


def as_latents(clips: dict) -> Tensor:
    """Converts to float (N, T, C, H, W) in [-1, 1]."""
    return clips["video"].float() / 127.5 - 1


TRAIN = batch(MovingShapes("train"))


def test_clip_format():
    clip = MovingShapes("train")[5]
    assert clip["video"].shape == (8, 3, 16, 16)
    assert clip["video"].dtype == torch.uint8
    assert clip["fps"] == 8.0
    assert set(clip["labels"]) == {"shape", "colour", "direction"} == set(MovingShapes.classes)


@pytest.mark.parametrize("index", range(0, 2304, 61))
def test_pixels_match_the_labels(index: int):
    clip = MovingShapes("train")[index]
    shape, colour, direction = (MovingShapes.classes[name][number] for name, number in clip["labels"].items())
    *names, row, column = clip["id"].removeprefix("moving-shapes-").split("-")
    assert names == [shape, colour, direction]
    assert clip["caption"] == f"a {colour} {shape} moves {direction}"
    assert 4 <= int(row) <= 11
    assert 4 <= int(column) <= 11
    down, right = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}[direction]
    for t in range(8):
        cy, cx = (int(row) + down * t) % 16, (int(column) + right * t) % 16
        for y in range(16):
            for x in range(16):
                dy, dx = y - cy, x - cx
                inside = {
                    "square": abs(dy) <= 3 and abs(dx) <= 3,
                    "disc": dy**2 + dx**2 <= 10,
                    "triangle": abs(dy) <= 3 and abs(dx) <= (dy + 3) / 2,
                }[shape]
                expected = [255 * (inside and colour == name) for name in ("red", "green", "blue")]
                assert clip["video"][t, :, y, x].tolist() == expected


def test_classes_are_balanced_in_the_first_clips():
    for count in (36, 144, 2304):
        for label, classes in MovingShapes.classes.items():
            share = TRAIN["labels"][label][:count].bincount()
            assert share.tolist() == [count // len(classes)] * len(classes)
    assert len(set(TRAIN["caption"][:36])) == 36


@pytest.mark.parametrize("starts", [1, 16, 64])
def test_held_out_clips_are_not_in_train(starts: int):
    train, held = (batch(MovingShapes(split, starts)) for split in ("train", "val"))
    assert len(train["id"]) == 36 * starts
    assert len(held["id"]) == len(set(held["id"])), "held-out clips must be distinct"
    assert not set(train["id"]) & set(held["id"])
    assert held["labels"]["shape"].bincount().tolist() == [len(held["id"]) // 3] * 3
    pixels = {video.numpy().tobytes() for video in held["video"]}
    assert len(pixels) == len(held["id"])
    assert not pixels & {video.numpy().tobytes() for video in train["video"]}


def test_start_centers_are_uniform():
    centres = torch.tensor([[int(part) for part in name.rsplit("-", 2)[1:]] for name in TRAIN["id"]])
    counts = ((centres[:, 0] - 4) * 8 + centres[:, 1] - 4).bincount(minlength=64)
    assert ((counts - 36) ** 2 / 36).sum() < 104  # chi², 63 degrees of freedom: p = .001
    assert 30 < len(set(TRAIN["id"])) / 36 < 50  # 41 distinct ones are expected in 64 draws


def test_clips_are_deterministic(tmp_path):
    assert torch.equal(MovingShapes("train", 3)[100]["video"], MovingShapes("train", 3, size=101)[100]["video"])
    dataset = MovingShapes("val", 3, size=40)
    cached = CachedClips(dataset, tmp_path)
    cached.prepare(num_workers=0)
    assert torch.equal(cached[17]["video"], dataset[17]["video"])
    assert MovingShapes("train", 3).cache_key != MovingShapes("train", 4).cache_key


@pytest.mark.parametrize(("starts", "linear", "late", "noise"), [(64, 0.166, 0.170, 0.164), (1, 0.044, 0.157, 0.161)])
def test_loss_of_the_best_linear_denoiser(starts: int, linear: float, late: float, noise: float):
    """The best linear estimate of ε - x0 from (1 - t) x0 + t ε has the error Σ variance / ((1 - t)² variance + t²) over
    the principal axes of the data. Its mean over t is π / 2 times the sum of the square roots of the variances.
    """
    videos, counts = as_latents(TRAIN)[: 36 * starts].flatten(1).unique(dim=0, return_counts=True)
    share = (counts / counts.sum()).double()
    scaled = (videos.double() - share @ videos.double()) * share.sqrt()[:, None]
    variances = torch.linalg.eigvalsh(scaled @ scaled.T).clamp(min=0)
    pixels = videos.shape[1]
    assert (math.pi / 2 * variances.sqrt().sum() / pixels).item() == pytest.approx(linear, rel=0.03)
    at = {t: (variances / ((1 - t) ** 2 * variances + t**2)).sum().item() / pixels for t in (0.95, 1.0)}
    assert at[0.95] == pytest.approx(late, rel=0.03)
    assert at[1.0] == pytest.approx(noise, rel=0.03)


def test_class_names():
    assert MovingShapes.classes == {"shape": SHAPES, "colour": COLOURS, "direction": tuple(DIRECTIONS)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"split": "test"}, "split='test' .*'train'.*'val'"),
        ({"split": "train", "starts": 0}, r"starts=0\b.*\b1\b"),
        ({"split": "val", "starts": 2000}, r"starts=2000\b.*\b64\b"),
        ({"split": "train", "size": 2305}, r"size=2305\b.*\b2304\b.*'train'.*starts=64\b"),
        ({"split": "train", "size": 0}, r"size=0\b.*'train'"),
    ],
)
def test_invalid_arguments_raise(options: dict, expected: str):
    with pytest.raises(ValueError, match=expected):
        MovingShapes(**options)


@pytest.mark.parametrize("index", [-1, 36])
def test_index_out_of_range_raises(index: int):
    with pytest.raises(IndexError, match=rf"index {index}\b.*\b36 clips"):
        MovingShapes("train", 1)[index]
