"""Image dataset of single frames of clips."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from blueberry_video.data.clip_cache import CachedClips
from blueberry_video.data.single_frames import SingleFrames
from blueberry_video.data.sprites import Sprites
from blueberry_video.data.video_folder import VideoFolder
from blueberry_video.data.world import World
from blueberry_video.data.write import write_video


def number(item: dict) -> int:
    return int(item["id"].rpartition("@")[2])


def test_item_is_the_frame_in_its_id_without_motion_labels():
    sprites = Sprites("train", 6)
    frames = SingleFrames(sprites)
    assert len(frames) == 6
    for index in range(6):
        item, clip = frames[index], sprites[index]
        assert item["video"].dtype == torch.uint8
        assert torch.equal(item["video"], clip["video"][number(item) : number(item) + 1])
        assert item["id"].startswith(clip["id"] + "@")
        assert item["caption"] == clip["caption"]
        assert item["labels"] == {name: clip["labels"][name] for name in ("shape", "colour", "size")}
    assert set(frames.classes) == {"shape", "colour", "size"}
    assert frames.reversal_pairs == {}


def test_random_frames_depend_only_on_seed_epoch_and_index():
    sprites = Sprites("train", 3)
    frames = SingleFrames(sprites, seed=1)
    shown = [number(frames.sample(2, epoch)) for epoch in range(200)]
    assert shown == [number(SingleFrames(sprites, seed=1).sample(2, epoch)) for epoch in range(200)]
    assert set(shown) == set(range(16))
    assert shown != [number(frames.sample(1, epoch)) for epoch in range(200)]
    assert shown != [number(SingleFrames(sprites, seed=2).sample(2, epoch)) for epoch in range(200)]
    assert number(frames[2]) == shown[0]


@pytest.mark.parametrize(("frame", "found"), [(0, 0), (15, 15), ("middle", 8)])
def test_fixed_frames_are_the_same_in_every_epoch(frame, found: int):
    frames = SingleFrames(Sprites("train", 2), frame)
    assert [number(frames.sample(1, epoch)) for epoch in range(5)] == [found] * 5
    assert not frames.varies_by_epoch


def test_fixed_frames_can_be_cached_and_random_ones_not(tmp_path: Path):
    sprites = Sprites("train", 3)
    keys = {SingleFrames(sprites, frame, seed).cache_key for frame in (0, "middle") for seed in (0, 1)}
    assert len(keys | {SingleFrames(Sprites("val", 3), 0).cache_key}) == 5
    cached = CachedClips(SingleFrames(sprites, "middle"), tmp_path)
    assert torch.equal(cached[1]["video"], sprites[1]["video"][8:9])
    with pytest.raises(ValueError, match=r"SingleFrames.*varies_by_epoch=True"):
        CachedClips(SingleFrames(sprites), tmp_path)


def test_frames_of_world_and_video_files(tmp_path: Path):
    image = SingleFrames(World("val", 2, num_frames=3, image_size=8, supersample=1))[1]
    assert image["video"].shape == (1, 3, 8, 8)
    assert set(image) == {"video", "id", "caption", "labels", "depth"}  # no poses and segments, which have all frames
    assert image["depth"].shape == (1, 8, 8)
    assert "motion" not in image["labels"]
    (tmp_path / "videos").mkdir()
    levels = np.arange(12, dtype=np.uint8)[:, None, None, None] * 16
    write_video(tmp_path / "videos" / "a.mp4", np.ascontiguousarray(np.broadcast_to(levels, (12, 16, 16, 3))), fps=10)
    window = VideoFolder(tmp_path, 4, sampler="random", metadata="none")
    frames = SingleFrames(window, frame=0)
    shown = [round(frames.sample(0, epoch)["video"].float().mean().item() / 16) for epoch in range(10)]
    starts = [round(window.sample(0, epoch)["video"][0].float().mean().item() / 16) for epoch in range(10)]
    assert shown == starts  # the epoch is passed to the videos
    assert len(set(shown)) > 2
    assert frames.varies_by_epoch


@pytest.mark.parametrize("frame", ["last", -1, 1.5, None])
def test_invalid_frame_raises(frame):
    with pytest.raises(ValueError, match=re.escape(f"frame={frame!r} ")):
        SingleFrames(Sprites("train", 2), frame)


def test_frame_outside_the_clip_raises():
    with pytest.raises(ValueError, match=r"frame=16\b.*'sprites-train-0'.*\b16 frames"):
        SingleFrames(Sprites("train", 2), 16)[0]


@pytest.mark.parametrize("key", ["depth", "disparity"])
def test_depth_is_that_of_the_frame(key: str):
    maps = torch.arange(3.0)[:, None, None].expand(3, 2, 2)
    clip = {"video": torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 2, 2), "id": "a", key: maps}
    item = SingleFrames([clip], frame=2)[0]
    assert set(item) == {"video", "id", key}
    assert (item[key].shape, item[key][0, 0, 0].item(), item["video"][0, 0, 0, 0].item()) == ((1, 2, 2), 2, 2)
