"""The procedural 3-D world: small ray-cast clips with ground truth for every family (labels, depth, poses, actions).

One to three spheres, boxes and cylinders stand on a checkered floor under one light; object 0 moves, or obeys commands,
and a camera watches (`scene.py` says how, `raycast.py` draws it). Clip i is a pure function of (split, i), drawn from
numpy's PCG64 seeded with SeedSequence([split, i]). The scene depends neither on the image size nor on the number of
frames, so that a preset only changes the resolution.

Letters: T frames, N objects, V views, H = W image side.
"""

import json
import operator
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from blueberry_video.data.raycast import render
from blueberry_video.data.scene import (
    CAMERAS,
    COLOURS,
    FOV,
    MOTIONS,
    SHAPES,
    SIZES,
    Scene,
    State,
    camera_poses,
    caption,
    draw_scene,
    intrinsics,
    push,
    random_actions,
    random_poses,
    trajectory,
)

SPLITS = {"train": 0, "val": 1, "test": 2}
MODES = ("motion", "agent")
FPS = 8.0
PRESETS = {  # World("train", **PRESETS["small"])
    "tiny": {"num_frames": 8, "image_size": 32},
    "small": {"num_frames": 16, "image_size": 64},
    "base": {"num_frames": 32, "image_size": 128},
    "depth": {"image_size": 126},  # a multiple of the patch of 14
    "depth_large": {"image_size": 518},  # what Depth Anything was trained at
}


class World(Dataset):
    """Clips of the procedural world; clip `i` is a pure function of (split, i).

    Args:
        split: "train", "val" or "test": three disjoint streams of random numbers.
        size: number of clips.
        num_frames: T, at least 2; at 8 frames/s.
        image_size: H = W in pixels, at least 8.
        min_objects, max_objects: 1 to 3; every clip draws its number of objects between them.
        camera: static, orbit, pan, dolly, dnerf (a random pose each frame) or rig4 (four static cameras, a quarter turn
            apart), or a list of these from which each clip draws.
        mode: "motion" (object 0 makes one of eight motions) or "agent" (it obeys a sticky random policy's actions).
        supersample: 1 to 8; supersample² rays make a pixel's colour. depth and seg always belong to its centre.

    `classes["motion"]` exists in motion mode only. `reversal_pairs` lists the motions that are each other played
    backwards; "still" and "hop" are their own reversal and so are in no pair. Reversal holds for every camera but
    dnerf, whose poses have no order.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 10_000,
        num_frames: int = 16,
        image_size: int = 64,
        min_objects: int = 1,
        max_objects: int = 3,
        camera: str | Sequence[str] = "static",
        mode: str = "motion",
        supersample: int = 2,
    ):
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is none of {', '.join(SPLITS)}: choose one of these.")
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is neither 'motion' nor 'agent': choose one of these.")
        cameras = (camera,) if isinstance(camera, str) else tuple(camera)
        if not cameras or not set(cameras) <= set(CAMERAS):
            raise ValueError(
                f"camera={camera!r} is not known: choose from {', '.join(CAMERAS)}, or list several of them."
            )
        for key, value, least in (("size", size, 1), ("num_frames", num_frames, 2)):
            if value < least:
                raise ValueError(f"{key}={value} is too small for the world: use at least {least}.")
        _check(image_size, min_objects, max_objects, supersample)
        self.split, self.size, self.num_frames, self.image_size = split, size, num_frames, image_size
        self.min_objects, self.max_objects, self.cameras = min_objects, max_objects, cameras
        self.mode, self.supersample = mode, supersample
        self.classes: dict[str, tuple[str, ...]] = {
            "shape": SHAPES,
            "colour": tuple(COLOURS),
            "size": tuple(SIZES),
            "motion": tuple(MOTIONS),
            "camera": tuple(CAMERAS),
        }
        self.reversal_pairs: dict[str, tuple[tuple[int, int], ...]] = {"motion": ((1, 2), (3, 4), (6, 7))}
        if mode == "agent":
            del self.classes["motion"], self.reversal_pairs["motion"]

    @property
    def cache_key(self) -> str:
        """Everything a clip depends on but its index; the number grows when the same arguments give other clips."""
        return (
            f"world-1/{self.split}/{self.num_frames}x{self.image_size}/objects={self.min_objects}-{self.max_objects}"
            f"/camera={'+'.join(self.cameras)}/{self.mode}/supersample={self.supersample}"
        )

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Clip `index` (`docs/architecture.md`, Clip) through the first camera.

        `seg` is 0 for sky, 1 for floor, 2 + k for object k. Agent mode adds `actions` (T-1,) int64, action t leading
        from frame t to t + 1, and `states` (T, 2) float32: object 0, metres right and away of the arena's centre as the
        reference camera sees it. Raises IndexError outside 0 to size - 1.
        """
        scene, centres, facts = self._play(index)
        poses = camera_poses(scene, self.num_frames)[0]
        video, depth, seg = render(scene, centres, poses, self.image_size, self.supersample)
        return {
            **facts,
            "video": torch.from_numpy(video),
            "depth": torch.from_numpy(depth),
            "seg": torch.from_numpy(seg),
            "intrinsics": torch.from_numpy(intrinsics(self.image_size)),
            "poses": torch.from_numpy(poses.astype(np.float32)),
        }

    def sample(self, index: int) -> dict[str, Any]:
        """Clip `index` through every camera (V views), with the whole ground truth.

        video (V, T, 3, H, W) uint8; depth (V, T, H, W) float32; valid, likewise bool, depth > 0; seg (V, T, H, W)
        uint8; K (V, 3, 3) and c2w (V, T, 4, 4) float32; time (T,) float32 from 0 to 1; `objects`, a dict of shape,
        colour, size (names), yaw (N,) radians and centres (T, N, 3) metres; id, fps, labels, caption, actions, states
        as in a clip.
        """
        scene, centres, facts = self._play(index)
        poses = camera_poses(scene, self.num_frames)
        views = [render(scene, centres, view, self.image_size, self.supersample) for view in poses]
        video, depth, seg = (torch.from_numpy(np.stack(kind)) for kind in zip(*views))
        return {
            **facts,
            "video": video,
            "depth": depth,
            "valid": depth > 0,
            "seg": seg,
            "K": torch.from_numpy(intrinsics(self.image_size)).repeat(len(poses), 1, 1),
            "c2w": torch.from_numpy(poses.astype(np.float32)),
            "time": torch.linspace(0, 1, self.num_frames),
            "objects": {
                "shape": scene.shapes,
                "colour": scene.colours,
                "size": scene.sizes,
                "yaw": torch.from_numpy(scene.yaw.astype(np.float32)),
                "centres": torch.from_numpy(centres.astype(np.float32)),
            },
        }

    def scene(self, index: int) -> Scene:
        """What clip `index` shows. Raises IndexError outside 0 to size - 1."""
        index = operator.index(index)
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside this dataset of {self.size} clips.")
        seed = (SPLITS[self.split], index)
        return draw_scene(seed, self.mode, self.min_objects, self.max_objects, self.cameras)

    def _play(self, index: int) -> tuple[Scene, np.ndarray, dict[str, Any]]:
        """The scene, its objects' centres (T, N, 3), and what needs no picture: id, fps, labels, caption, the agent."""
        scene = self.scene(index)
        shown = {
            "shape": scene.shapes[0],
            "colour": scene.colours[0],
            "size": scene.sizes[0],
            "motion": scene.motion,
            "camera": scene.camera,
        }
        facts = {
            "id": f"world-{self.split}-{index}",
            "fps": FPS,
            "labels": {label: names.index(shown[label]) for label, names in self.classes.items()},
            "caption": caption(scene, self.mode),
        }
        if self.mode == "motion":
            return scene, trajectory(scene, self.num_frames), facts
        actions = random_actions(scene, self.num_frames - 1)
        states = [State(scene, scene.rest[0, :2])]
        for action in actions:
            states.append(State(scene, push(scene, states[-1].position, action)))
        vectors = np.stack([state.vector for state in states]).astype(np.float32)
        facts |= {"actions": torch.tensor(actions), "states": torch.from_numpy(vectors)}
        return scene, np.stack([state.centres for state in states]), facts

    def export_dnerf(self, index: int, folder: str | Path) -> None:
        """Writes clip `index` as a D-NeRF scene (Pumarola et al. 2021; read by 4D-GS): transforms_{train,val,test}.json
        and RGBA pictures, transparent where only sky is seen, so that compositing over white gives back the clip.

        train holds every view and frame of the clip; val and test the same moments from random held-out poses. Poses
        are OpenGL camera-to-world (y up, z backwards), times run from 0 to 1.
        """
        scene, centres, _ = self._play(index)
        held_out = [random_poses((*scene.seed, stream), self.num_frames)[None] for stream in (3, 4)]
        for split, poses in zip(SPLITS, [camera_poses(scene, self.num_frames), *held_out]):
            pictures = Path(folder) / split
            pictures.mkdir(parents=True, exist_ok=True)
            frames: list[dict[str, Any]] = []
            for view in poses:
                video, depth, _ = render(scene, centres, view, self.image_size, self.supersample)
                opaque = (depth > 0) | (video < 255).any(1)  # a half-covered edge pixel may have its centre in the sky
                rgba = np.concatenate([video, np.uint8(255) * opaque[:, None]], axis=1).transpose(0, 2, 3, 1)
                for t, (picture, pose) in enumerate(zip(rgba, view)):
                    name = f"r_{len(frames):03d}"
                    Image.fromarray(np.ascontiguousarray(picture)).save(pictures / f"{name}.png")
                    opengl = pose * [1, -1, -1, 1]  # y and z of the camera point up and backwards
                    frames.append(
                        {
                            "file_path": f"./{split}/{name}",
                            "time": t / (self.num_frames - 1),
                            "transform_matrix": opengl.tolist(),
                        }
                    )
            text = json.dumps({"camera_angle_x": FOV, "frames": frames}, indent=1)
            (Path(folder) / f"transforms_{split}.json").write_text(text)


class Simulator:
    """The agent's world one step at a time, under a static camera, for closed-loop planning.

    `reset((split, index))` starts where clip `index` of `World(mode="agent")` with these object counts starts (splits
    are 0, 1, 2); the clip's actions then replay it. Assign `state` to rewind, or call `scene.push` to look ahead.

    Raises:
        ValueError: an argument out of range; see World.
    """

    def __init__(self, image_size: int = 64, min_objects: int = 1, max_objects: int = 3, supersample: int = 2):
        _check(image_size, min_objects, max_objects, supersample)
        self.image_size, self.supersample = image_size, supersample
        self.min_objects, self.max_objects = min_objects, max_objects
        self.state: State | None = None

    def reset(self, seed: Sequence[int]) -> State:
        """Draws a scene; `seed` is a few integers of at least 0."""
        scene = draw_scene(seed, "agent", self.min_objects, self.max_objects, ["static"])
        self.state = State(scene, scene.rest[0, :2])
        return self.state

    def step(self, action: int) -> State:
        """Carries out an action (an index into ACTIONS). Raises RuntimeError before the first reset, ValueError on an
        unknown action."""
        if self.state is None:
            raise RuntimeError("The simulator has no scene yet: call reset(seed) before step(action).")
        self.state = replace(self.state, position=push(self.state.scene, self.state.position, action))
        return self.state

    def render(self, state: State) -> Tensor:
        """The picture of a state, (3, H, W) uint8."""
        pose = camera_poses(state.scene, 2)[0, :1]
        video, _, _ = render(state.scene, state.centres[None], pose, self.image_size, self.supersample)
        return torch.from_numpy(video[0])


def _check(image_size: int, min_objects: int, max_objects: int, supersample: int) -> None:
    if image_size < 8:
        raise ValueError(f"image_size={image_size} is too small for the world: use at least 8.")
    if not 1 <= min_objects <= max_objects <= 3:
        raise ValueError(
            f"min_objects={min_objects} and max_objects={max_objects} do not fit: use 1 to 3, the first not above the "
            "second."
        )
    if not 1 <= supersample <= 8:
        raise ValueError(f"supersample={supersample} is outside 1 to 8, the rays along each side of a pixel.")
