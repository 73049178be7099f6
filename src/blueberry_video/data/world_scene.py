"""Scene of the procedural world as posed views at known times, for reconstruction, with held-out views and times."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from blueberry_video.data.clips import check_index
from blueberry_video.data.raycast import render
from blueberry_video.data.scene import Scene, camera_poses, intrinsics, random_poses, trajectory
from blueberry_video.data.world import SPLITS, World

CAMERAS = ("dnerf", "rig4")
STREAM = {"train": 2, "val": 5, "test": 6}  # random streams of the poses; 3 and 4 are those of World.export_dnerf


class WorldScene(Dataset):
    """Views of one moving scene as clips of one frame, with the items of
    :class:`~blueberry_video.data.scene_folder.SceneFolder`.

    The training times are ``num_times`` equidistant times from 0 to 1. Views of "val" and "test" are at times half-way
    between these, from random poses: neither their time nor their pose is in the training set.

    Args:
        split: "train", "val" or "test": different poses of the same scene.
        scene: number of the scene, at least 0; counts the scenes of the world in which object 0 moves.
        num_times: number of training times, at least 3.
        num_held_out: number of views of "val" and of "test", at most ``num_times - 1``.
        camera: training cameras: "dnerf", one random pose at each time, or "rig4", four static cameras.
        image_size: H = W in pixels, at least 8.
        min_objects, max_objects: 1 to 3 objects; object 0 moves.
        supersample: 1 to 8; supersample² rays per pixel.

    Attributes:
        points, colors: ``None``: there is no point cloud.
        background: color of the sky, white.
        poses, times: float32 (n, 4, 4) camera-to-world and (n,).

    Raises:
        ValueError: an argument out of range.
    """

    points = colors = None
    background = (1.0, 1.0, 1.0)

    def __init__(
        self,
        split: str = "train",
        scene: int = 0,
        num_times: int = 48,
        num_held_out: int = 24,
        camera: str = "dnerf",
        image_size: int = 64,
        min_objects: int = 2,
        max_objects: int = 3,
        supersample: int = 2,
    ):
        if split not in SPLITS:
            raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}.")
        if camera not in CAMERAS:
            raise ValueError(f"camera={camera!r} must be one of {', '.join(CAMERAS)}.")
        if scene < 0 or num_times < 3 or not 1 <= num_held_out < num_times:
            raise ValueError(
                f"scene={scene} must be at least 0, num_times={num_times} at least 3, and num_held_out={num_held_out} "
                f"from 1 to num_times - 1 = {num_times - 1}."
            )
        self.split, self.number, self.camera, self.supersample = split, scene, camera, supersample
        self.image_size = image_size
        self.classes: dict[str, tuple[str, ...]] = {}
        self.reversal_pairs: dict[str, tuple[tuple[int, int], ...]] = {}
        world = World("train", 2**31, 2, image_size, min_objects, max_objects, camera, supersample=supersample)
        self.scene = moving_scene(world, scene)
        ticks = 2 * num_times - 1  # training times and the times half-way between them
        if split == "train":
            chosen = np.arange(0, ticks, 2)
            poses = camera_poses(self.scene, num_times)  # (V, T, 4, 4)
        else:
            chosen = 1 + 2 * np.linspace(0, num_times - 2, num_held_out).round().astype(int)
            poses = random_poses((*self.scene.seed, STREAM[split]), num_held_out)[None]
        self._centers = np.tile(trajectory(self.scene, ticks)[chosen], (len(poses), 1, 1))
        self._poses = poses.reshape(-1, 4, 4)
        self.times = torch.from_numpy(np.tile(chosen / (ticks - 1), len(poses)).astype(np.float32))
        self.poses = torch.from_numpy(self._poses.astype(np.float32))
        self._pixels: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.times)

    def __getitem__(self, index: int) -> dict[str, Any]:
        check_index(index, len(self))
        if index not in self._pixels:
            one = slice(index, index + 1)
            video, _, _ = render(self.scene, self._centers[one], self._poses[one], self.image_size, self.supersample)
            self._pixels[index] = torch.from_numpy(video)
        return {
            "video": self._pixels[index],
            "intrinsics": torch.from_numpy(intrinsics(self.image_size)),
            "poses": self.poses[index, None],
            "time": self.times[index, None],
            "id": f"scene-{self.number}-{self.split}-{index}",
        }

    def describe(self) -> str:
        """One line about the scene."""
        return (
            f"scene {self.number} of the world ({len(self.scene.shapes)} objects, motion {self.scene.motion}): "
            f"{len(self)} {self.split} views at {len(set(self.times.tolist()))} times"
        )


def moving_scene(world: World, number: int) -> Scene:
    """Returns the scene with this number among those of a world in which object 0 moves."""
    for index in range(len(world)):
        scene = world.scene(index)
        number -= scene.motion != "still"
        if number < 0:
            return scene
    raise IndexError(f"the world has only {len(world)} scenes.")
