"""Clips in which the camera leaves an object: unseen frames are exact and reveal nothing, actions match the poses."""

import hashlib
import json

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from blueberry_video.data import memory_world
from blueberry_video.data.clip_cache import CachedClips
from blueberry_video.data.memory_world import PAN_ACTIONS, PAN_STEP, MemoryWorld
from blueberry_video.data.raycast import FIRST_OBJECT, render
from blueberry_video.data.scene import SIZES
from blueberry_video.data.world import SPLITS


def test_clip_format():
    world = MemoryWorld("train", 4, num_frames=13, image_size=16, unseen=[3, 4])
    batch = default_collate([world[i] for i in range(4)])
    assert (batch["video"].shape, batch["video"].dtype) == ((4, 13, 3, 16, 16), torch.uint8)
    assert (batch["depth"].shape, batch["seg"].shape) == ((4, 13, 16, 16), (4, 13, 16, 16))
    assert (batch["actions"].shape, batch["actions"].dtype) == ((4, 12), torch.int64)
    assert (batch["visible"].shape, batch["visible"].dtype) == ((4, 13), torch.bool)
    assert (batch["poses"].shape, batch["poses"].dtype) == ((4, 13, 4, 4), torch.float32)
    assert batch["id"] == [f"memory-train-{i}" for i in range(4)]
    assert batch["labels"].keys() == world.classes.keys()
    for i, caption in enumerate(batch["caption"]):
        named = {label: names[batch["labels"][label][i]] for label, names in world.classes.items()}
        assert caption.startswith(f"a {named['size']} {named['colour']} {named['shape']} stays still")


@pytest.mark.parametrize(("image_size", "supersample"), [(16, 4), (32, 1)])
@pytest.mark.parametrize("unseen", [1, 8])
def test_the_object_is_out_of_view_in_exactly_the_unseen_frames(image_size: int, supersample: int, unseen: int):
    world = MemoryWorld("val", 25, unseen + 9, image_size, unseen, seen=5, supersample=supersample)
    for i in range(25):
        clip = world[i]
        in_view = (clip["seg"] >= FIRST_OBJECT).flatten(1).any(1)
        assert in_view.tolist() == [True] * 5 + [False] * unseen + [True] * 4
        assert clip["visible"].tolist() == in_view.tolist()
        hidden = clip["video"][~in_view].int()
        assert (hidden.amax(1) - hidden.amin(1)).max() <= 1  # gray
        assert torch.equal(clip["video"][6 + unseen :], clip["video"][:1].expand(3, -1, -1, -1))
        assert torch.equal(clip["video"][1:4], clip["video"][:1].expand(3, -1, -1, -1))


def test_unseen_frames_do_not_depend_on_the_object():
    """They equal those of the same camera path without the object and its shadow."""
    world = MemoryWorld("train", 40, num_frames=17, image_size=32, unseen=8, supersample=2)
    for i in range(40):
        clip, scene = world[i], world.scene(i)
        hidden = ~clip["visible"].numpy()
        poses = memory_world._pose(scene, world._steps(i))[hidden]
        far = np.repeat(scene.rest[None] + [0, 0, -1000], len(poses), axis=0)
        assert np.array_equal(clip["video"].numpy()[hidden], render(scene, far, poses, 32, 2)[0])


def test_the_object_is_clearly_visible_at_the_start_and_the_end():
    world = MemoryWorld("test", 60, num_frames=8, image_size=16, unseen=1, supersample=1)
    areas = {size: [] for size in SIZES}
    for i in range(60):
        shown = world[i]["seg"][0] >= FIRST_OBJECT
        border = torch.cat([shown[0], shown[-1], shown[:, 0], shown[:, -1]])
        assert not border.any()
        areas[world.scene(i).sizes[0]].append(int(shown.sum()))
    assert min(areas["small"]) >= 6
    assert min(areas["large"]) >= 20


def test_actions_turn_the_camera():
    world = MemoryWorld("train", 30, num_frames=25, image_size=8, unseen=[8, 16], supersample=1)
    angle = {"stay": 0.0, "left": PAN_STEP, "right": -PAN_STEP}
    first = set()
    for i in range(30):
        clip = world[i]
        forward = clip["poses"][:, :3, 2].double()
        heading = np.unwrap(torch.atan2(forward[:, 1], forward[:, 0]).numpy())  # counterclockwise is to the left
        expected = [angle[PAN_ACTIONS[action]] for action in clip["actions"]]
        np.testing.assert_allclose(np.diff(heading), expected, atol=1e-5)
        assert heading[-1] == pytest.approx(heading[0], abs=1e-5)
        steps = np.round(np.abs(heading - heading[0]) / PAN_STEP)
        assert (steps[~clip["visible"].numpy()] >= 2).all()
        assert steps.max() <= 4
        first.add(PAN_ACTIONS[clip["actions"][clip["actions"] > 0][0]])
    assert first == {"left", "right"}
    away = torch.cat([world[i]["actions"][5:12] for i in range(30)])
    assert set(away.tolist()) == {0, 1, 2}  # the camera does not only wait


def test_each_clip_draws_its_number_of_unseen_frames():
    world = MemoryWorld("train", 40, num_frames=19, image_size=8, unseen=[2, 12], supersample=1)
    counts = [int((~world[i]["visible"]).sum()) for i in range(40)]
    assert set(counts) == {2, 12}
    assert 8 < counts.count(2) < 32


def test_clip_depends_only_on_split_and_index():
    small, large = (MemoryWorld("train", size, 12, 8, 4) for size in (4, 900))
    large[899]
    for i in (3, 0, 3):
        assert all(torch.equal(small[i][key], large[i][key]) for key in ("video", "actions", "poses"))
    videos = {MemoryWorld(split, 5, 12, 8, 4)[i]["video"].numpy().tobytes() for split in SPLITS for i in range(5)}
    assert len(videos) == 15
    longer = MemoryWorld("train", 4, 20, 16, 4)
    assert longer[1]["caption"] == small[1]["caption"]
    assert torch.equal(longer[1]["poses"][:12], small[1]["poses"])
    with pytest.raises(IndexError, match="index 4 "):
        small[4]


def test_clips_match_the_pinned_hash():
    """A changed hash changes all results: increase the number in cache_key as well."""
    world = MemoryWorld("val", 11, 17, 16, 8)
    parts = []
    for i in (5, 6, 10):  # without numbers near a rounding threshold
        clip = world[i]
        poses = (clip["poses"] * 1000).round().int().tolist()
        blocks = (clip["video"].float().unflatten(-1, (4, 4)).unflatten(-3, (4, 4)).mean((-1, -3)) / 16).round().int()
        parts.append([clip["caption"], clip["actions"].tolist(), poses, blocks.tolist()])
    assert hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16] == "67ce1cfecbfcd528"


def test_sizes_of_objects():
    world = MemoryWorld("train", 20, 8, 8, 1, sizes=["large"], supersample=1)
    assert {world.scene(i).sizes[0] for i in range(20)} == {"large"}


def test_cache_key_differs_if_clips_differ(tmp_path):
    changes = [
        {},
        {"split": "val"},
        {"num_frames": 30},
        {"image_size": 32},
        {"unseen": 8},
        {"unseen": [8, 16]},
        {"seen": 4},
        {"sizes": ["small"]},
        {"supersample": 1},
    ]
    assert len({MemoryWorld(**change).cache_key for change in changes}) == len(changes)
    assert MemoryWorld(unseen=[16]).cache_key == MemoryWorld(unseen=16, size=3).cache_key
    world = MemoryWorld("train", 2, 8, 8, 1)
    cached = CachedClips(world, tmp_path)
    assert cached.classes == world.classes
    assert torch.equal(cached[1]["visible"], world[1]["visible"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"split": "dev"}, "split='dev'.*train"),
        ({"size": 0}, "size=0"),
        ({"image_size": 7}, "image_size=7 .*8"),
        ({"unseen": 0}, "unseen=0"),
        ({"unseen": []}, r"unseen=\[\]"),
        ({"seen": 1}, "seen=1 .*2"),
        ({"num_frames": 22}, "num_frames=22 .*23"),
        ({"num_frames": 22, "unseen": [4, 16]}, "num_frames=22 .*23"),
        ({"sizes": []}, r"sizes=\[\]"),
        ({"sizes": "small"}, "sizes='small'"),
        ({"sizes": ["tiny"]}, "sizes=.*tiny.*small"),
        ({"supersample": 9}, "supersample=9"),
    ],
)
def test_values_out_of_range_raise(options: dict, expected: str):
    with pytest.raises(ValueError, match=expected):
        MemoryWorld(**options)
