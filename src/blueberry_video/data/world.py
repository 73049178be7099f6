"""Procedural 3-D world: small ray-cast clips with ground truth for all tasks (labels, depth, poses, actions).

One to three spheres, boxes and cylinders are on a checkered floor under one light; object 0 moves or follows actions,
seen by one or more cameras (`scene.py` draws the scene, `raycast.py` renders it). Clip i is a pure function of (split,
i), drawn from numpy's PCG64 seeded with SeedSequence([split, i]). The scene depends neither on the image size nor on
the number of frames, so that presets differ only in resolution.

Shapes: T frames, N objects, V views, H = W image side.
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

from blueberry_video.data.clips import check_index
from blueberry_video.data.raycast import render
from blueberry_video.data.scene import (
    ACTIONS,
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
    "depth_large": {"image_size": 518},  # training resolution of Depth Anything
}


class World(Dataset):
    """Clips of the procedural world; clip `i` is a pure function of (split, i).

    Args:
        split: "train", "val" or "test": three disjoint random streams.
        size: number of clips.
        num_frames: T, at least 2; at 8 frames/s.
        image_size: H = W in pixels, at least 8.
        min_objects, max_objects: 1 to 3; each clip draws its number of objects from this range.
        camera: static, orbit, pan, dolly, dnerf (a random pose for each frame) or rig4 (four static cameras at 90°
            intervals), or a list of these, from which each clip draws.
        mode: "motion" (object 0 makes one of eight motions) or "agent" (it follows a sticky random policy).
        supersample: 1 to 8; supersample² rays per pixel for the colour. depth and seg are those of the pixel's center.

    `classes["motion"]` exists only in motion mode. `reversal_pairs` lists the motions that are time reversals of each
    other; "still" and "hop" are their own reversals and are in no pair. Reversal holds for every camera except dnerf,
    in which the poses have no order.

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
            raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}.")
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} must be 'motion' or 'agent'.")
        cameras = (camera,) if isinstance(camera, str) else tuple(camera)
        if not cameras or not set(cameras) <= set(CAMERAS):
            raise ValueError(f"camera={camera!r} must be one of {', '.join(CAMERAS)}, or a list of several.")
        for key, value, least in (("size", size, 1), ("num_frames", num_frames, 2)):
            if value < least:
                raise ValueError(f"{key}={value} must be at least {least}.")
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
        self.action_names: tuple[str, ...] = ACTIONS if mode == "agent" else ()
        if mode == "agent":
            del self.classes["motion"], self.reversal_pairs["motion"]

    @property
    def cache_key(self) -> str:
        """Everything that a clip depends on except its index; the number is a version of the generator."""
        return (
            f"world-1/{self.split}/{self.num_frames}x{self.image_size}/objects={self.min_objects}-{self.max_objects}"
            f"/camera={'+'.join(self.cameras)}/{self.mode}/supersample={self.supersample}"
        )

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Clip `index` (`docs/architecture.md`, Clip) from the first camera.

        `seg` is 0 for sky, 1 for floor, 2 + k for object k. Agent mode adds `actions` (T-1,) int64, where action t
        leads from frame t to t + 1, and `states` (T, 2) float32: object 0, meters right and away from the center of the
        arena in the view of the reference camera. Raises an IndexError outside 0 to size - 1.
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
        """Clip `index` from every camera (V views), with the complete ground truth.

        video (V, T, 3, H, W) uint8; depth (V, T, H, W) float32; valid, the same shape, bool, depth > 0; seg
        (V, T, H, W) uint8; K (V, 3, 3) and c2w (V, T, 4, 4) float32; time (T,) float32 from 0 to 1; `objects`, a dict
        of shape, colour, size (names), yaw (N,) in radians and centres (T, N, 3) in meters; id, fps, labels, caption,
        actions, states as in a clip.
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
        """Scene of clip `index`. Raises an IndexError outside 0 to size - 1."""
        index = operator.index(index)
        check_index(index, self.size)
        seed = (SPLITS[self.split], index)
        return draw_scene(seed, self.mode, self.min_objects, self.max_objects, self.cameras)

    def _play(self, index: int) -> tuple[Scene, np.ndarray, dict[str, Any]]:
        """Returns the scene, object centers (T, N, 3), and a dict of id, fps, labels, caption, actions and states."""
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
        and RGBA images, transparent where a pixel shows only sky, so that compositing over white restores the clip.

        train contains every view and frame of the clip; val and test the same times from random held-out poses. Poses
        are OpenGL camera-to-world (y up, z backwards); times are from 0 to 1.
        """
        scene, centres, _ = self._play(index)
        held_out = [random_poses((*scene.seed, stream), self.num_frames)[None] for stream in (3, 4)]
        for split, poses in zip(SPLITS, [camera_poses(scene, self.num_frames), *held_out]):
            pictures = Path(folder) / split
            pictures.mkdir(parents=True, exist_ok=True)
            frames: list[dict[str, Any]] = []
            for view in poses:
                video, depth, _ = render(scene, centres, view, self.image_size, self.supersample)
                opaque = (depth > 0) | (video < 255).any(1)  # the center of a partly covered edge pixel may be sky
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
    """Step-by-step simulator of the agent's world under a static camera, for closed-loop planning.

    `reset((split, index))` returns the first state of clip `index` of `World(mode="agent")` with the same object counts
    (splits are 0, 1, 2); the clip's actions then replay it. Assign `state` to rewind, or call `scene.push` to look
    ahead.

    Raises:
        ValueError: an argument out of range; see World.
    """

    def __init__(self, image_size: int = 64, min_objects: int = 1, max_objects: int = 3, supersample: int = 2):
        _check(image_size, min_objects, max_objects, supersample)
        self.image_size, self.supersample = image_size, supersample
        self.min_objects, self.max_objects = min_objects, max_objects
        self.state: State | None = None

    def reset(self, seed: Sequence[int]) -> State:
        """Draws a scene from `seed`, a sequence of integers of at least 0."""
        scene = draw_scene(seed, "agent", self.min_objects, self.max_objects, ["static"])
        self.state = State(scene, scene.rest[0, :2])
        return self.state

    def step(self, action: int) -> State:
        """Applies an action (an index into ACTIONS). Raises a RuntimeError before the first reset, a ValueError for an
        unknown action."""
        if self.state is None:
            raise RuntimeError("The simulator has no state: call reset(seed) before step(action).")
        self.state = replace(self.state, position=push(self.state.scene, self.state.position, action))
        return self.state

    def render(self, state: State) -> Tensor:
        """Renders a state, (3, H, W) uint8."""
        pose = camera_poses(state.scene, 2)[0, :1]
        video, _, _ = render(state.scene, state.centres[None], pose, self.image_size, self.supersample)
        return torch.from_numpy(video[0])


def _check(image_size: int, min_objects: int, max_objects: int, supersample: int) -> None:
    if image_size < 8:
        raise ValueError(f"image_size={image_size} must be at least 8.")
    if not 1 <= min_objects <= max_objects <= 3:
        raise ValueError(
            f"min_objects={min_objects} and max_objects={max_objects} must be 1 to 3, the first at most the second."
        )
    if not 1 <= supersample <= 8:
        raise ValueError(f"supersample={supersample} must be 1 to 8, the number of rays along each side of a pixel.")
