"""Sprites: pixels match the labels, and motions are exact time reversals of each other."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from blueberry_video.data import sprites
from blueberry_video.data.sprites import COLOURS, MOTIONS, SHAPES, SIZES, SPLITS, Sprites

LARGE = Sprites("train", size=80, num_frames=8, image_size=64)


def coloured(video: torch.Tensor) -> np.ndarray:
    """Mask (T, H, W) of the pixels of which the shape covers at least half; backgrounds are grey."""
    frames = video.numpy().astype(int)
    saturation = frames.max(axis=1) - frames.min(axis=1)
    return saturation > saturation.max() / 2


def inside(mask: np.ndarray) -> bool:
    """Returns True if the shape is completely visible in every frame."""
    return not (mask[:, [0, -1]].any() or mask[:, :, [0, -1]].any())


def measured(clip: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns center row, center column and area of the shape, (T,) each."""
    mask = coloured(clip["video"])
    area = mask.sum(axis=(1, 2))
    rows, columns = np.arange(64)[:, None], np.arange(64)
    return (mask * rows).sum(axis=(1, 2)) / area, (mask * columns).sum(axis=(1, 2)) / area, area


def named(clip: dict, label: str) -> str:
    return LARGE.classes[label][clip["labels"][label]]


def test_clip_format():
    clip = Sprites("val", size=3, num_frames=5, image_size=24)[2]
    assert clip["video"].shape == (5, 3, 24, 24)
    assert clip["video"].dtype == torch.uint8
    assert set(clip["labels"]) == {"shape", "colour", "size", "motion"}
    assert clip["id"] == "sprites-val-2"
    assert clip["fps"] == 8.0
    batch = default_collate([Sprites("val", 2)[0], Sprites("val", 2)[1]])
    assert batch["video"].shape == (2, 16, 3, 32, 32)
    assert batch["labels"]["motion"].dtype == torch.long


@pytest.mark.parametrize("index", range(40))
def test_motion_label_matches_the_pixels(index):
    clip = LARGE[index]
    motion, (y, x, area) = named(clip, "motion"), measured(clip)
    sign = 1 if motion in ("cw", "grow", "right", "down") else -1
    whole = inside(coloured(clip["video"]))
    if motion in ("cw", "ccw"):  # rows point down: an increasing angle is clockwise
        angle = np.unwrap(np.arctan2(y - 31.5, x - 31.5))
        assert (sign * np.diff(angle) > 0).all()
        assert sign * (angle[-1] - angle[0]) == pytest.approx(2 * math.pi, abs=0.05)
    elif motion in ("grow", "shrink"):
        assert (sign * np.diff(area) >= 0).all()
        assert sign * (area[-1] - area[0]) > 0
        if whole:
            assert area.max() / area.min() == pytest.approx((1.3 / 0.7) ** 2, rel=0.2)
    else:
        along, across = (x, y) if motion in ("left", "right") else (y, x)
        assert (sign * np.diff(along) > 0).all()
        if whole:
            assert np.ptp(across) < 0.5
            assert np.ptp(along) == pytest.approx(0.6 * 64, abs=1)


def test_every_class_occurs():
    clips = [LARGE[i] for i in range(80)]
    for label, classes in LARGE.classes.items():
        assert {clip["labels"][label] for clip in clips} == set(range(len(classes)))


@pytest.mark.parametrize("index", range(20))
def test_colour_label_matches_the_pixels(index):
    clip = LARGE[index]
    frame = clip["video"][4].numpy().astype(int)
    spot = np.unravel_index((frame.max(axis=0) - frame.min(axis=0)).argmax(), (64, 64))
    expected = np.array(COLOURS[named(clip, "colour")]) * 255
    assert np.abs(frame[:, spot[0], spot[1]] - expected).max() <= 1


def test_shape_and_size_labels_match_the_pixels():
    fill = {"square": 1.0, "disc": math.pi / 4, "triangle": 0.5}  # fraction of the bounding box
    seen = set()
    for i in range(80):
        clip = LARGE[i]
        mask = coloured(clip["video"])
        if named(clip, "motion") in ("grow", "shrink") or not inside(mask):
            continue
        middle = mask[4]
        height, width = (np.ptp(np.nonzero(middle)[axis]) + 1 for axis in (0, 1))
        assert middle.sum() / (height * width) == pytest.approx(fill[named(clip, "shape")], abs=0.12)
        radius = SIZES[named(clip, "size")] * 64
        extent = {"square": 1.78 * radius, "disc": 2 * radius, "triangle": 1.8 * radius}[named(clip, "shape")]
        assert height == pytest.approx(extent, abs=1.5)
        seen.add((named(clip, "shape"), named(clip, "size")))
    assert len(seen) == len(SHAPES) * len(SIZES)


def test_caption_matches_the_labels():
    for i in range(40):
        clip = LARGE[i]
        size, colour, shape = (named(clip, label) for label in ("size", "colour", "shape"))
        verb = {
            "left": "moves left",
            "right": "moves right",
            "up": "moves up",
            "down": "moves down",
            "cw": "circles clockwise",
            "ccw": "circles counterclockwise",
            "grow": "grows",
            "shrink": "shrinks",
        }[named(clip, "motion")]
        assert clip["caption"] == f"a {size} {colour} {shape} {verb} on a plain background"
    assert Sprites("train", 1, background="texture")[0]["caption"].endswith("on a texture background")


@pytest.mark.parametrize(
    "options", [{}, {"distractors": 2, "background": "texture"}, {"num_frames": 7, "image_size": 33}]
)
def test_opposite_motion_with_the_same_seed_is_the_reversed_clip(options, monkeypatch):
    """Exactly, in every pixel: otherwise a single frame could reveal the motion."""
    dataset = Sprites("train", 60, **options)
    opposite = {a: b for pair in dataset.reversal_pairs["motion"] for a, b in (pair, pair[::-1])}
    clips = [dataset[i] for i in range(60)]
    monkeypatch.setattr(sprites, "MOTIONS", tuple(MOTIONS[opposite[m]] for m in range(8)))
    for i, clip in enumerate(clips):
        assert torch.equal(dataset[i]["video"], clip["video"].flip(0)), clip["caption"]
    assert {clip["labels"]["motion"] for clip in clips} == set(range(8))


def test_each_motion_is_in_one_reversal_pair():
    pairs = [{MOTIONS[a], MOTIONS[b]} for a, b in Sprites.reversal_pairs["motion"]]
    assert pairs == [{"left", "right"}, {"up", "down"}, {"cw", "ccw"}, {"grow", "shrink"}]


def test_clip_depends_only_on_split_and_index():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    small, large = Sprites("train", 10, distractors=1), Sprites("train", 500, distractors=1)
    large[499]
    assert torch.equal(small[7]["video"], large[7]["video"])
    assert torch.equal(small[7]["video"], small[7]["video"])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    videos = [Sprites(split, 10)[i]["video"] for split in SPLITS for i in range(10)]
    assert len({video.numpy().tobytes() for video in videos}) == 30


def test_cache_key_differs_if_clips_differ():
    different = [
        {},
        {"split": "val"},
        {"num_frames": 8},
        {"image_size": 16},
        {"distractors": 1},
        {"background": "texture"},
        {"background": "texture", "drift": 1.0},
    ]
    keys = {Sprites(**{"split": "train", "size": 5, **options}).cache_key for options in different}
    assert len(keys) == len(different)
    assert Sprites("train", 5).cache_key == Sprites("train", 9).cache_key


@pytest.mark.parametrize("index", range(10))
def test_distractors_are_static_and_below_the_moving_shape(index):
    clip = Sprites("train", 10, num_frames=8, image_size=64, distractors=3)[index]
    video = clip["video"].numpy().astype(int)
    still = (video == video[:1]).all(axis=(0, 1))
    saturated = video[0].max(axis=0) - video[0].min(axis=0) > 60
    assert (still & saturated).any(), "a distractor must be visible"
    colour = np.array(COLOURS[named(clip, "colour")]) * 255
    own = np.abs(video - colour[:, None, None]).max(axis=1) <= 1
    assert own.any(axis=(1, 2)).all(), "the moving shape must be visible"


@pytest.mark.parametrize("index", range(5))
def test_plain_background_is_uniform_grey(index):
    video = LARGE[index]["video"].permute(0, 2, 3, 1).reshape(-1, 3)  # the pixels of all frames
    colours, counts = video.unique(dim=0, return_counts=True)
    assert counts.max() > 0.7 * len(video)
    red, green, blue = (colours[counts.argmax()] / 255).tolist()
    assert red == green == blue
    assert 0.298 < red < 0.602


@pytest.mark.parametrize("index", range(4))
def test_texture_has_no_constant_patch_and_drifts(index):
    still, drifting = (
        Sprites("train", 4, background="texture", drift=drift)[index]["video"].float() for drift in (0.0, 2.0)
    )
    assert still.unfold(2, 8, 8).unfold(3, 8, 8).std(dim=(-1, -2)).min() > 1  # grey levels of 255
    assert (still == still[:1]).float().mean() > 0.5  # except for the path of the shape
    assert (drifting == drifting[:1]).float().mean() < 0.3


@pytest.mark.parametrize("index", [-1, 3])
def test_index_out_of_range_raises(index):
    with pytest.raises(IndexError, match=rf"index {index}\b.*\b3 clips"):
        Sprites("train", 3)[index]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"split": "valid"}, "split='valid' .*train, val, test"),
        ({"background": "noise"}, "background='noise' .*'plain'.*'texture'"),
        ({"size": 0}, r"^size=0\b.*\b1\b"),
        ({"num_frames": 1}, r"num_frames=1\b.*\b2\b"),
        ({"image_size": 7}, r"image_size=7\b.*\b8\b"),
        ({"distractors": -1}, r"distractors=-1 and drift=0\.0\b.*\b0\b"),
        ({"drift": -0.5}, r"distractors=0 and drift=-0\.5\b.*\b0\b"),
    ],
)
def test_invalid_arguments_raise(options, expected):
    with pytest.raises(ValueError, match=expected):
        Sprites(**{"split": "train", "size": 4, **options})
