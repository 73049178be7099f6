"""Clips of the procedural world in which the camera pans away from an object and returns, for tests of memory.

The camera pans in steps of 20°: a number of frames of the initial view, one step at which the object is at the
border, the frames without it, one step back, and the initial view to the end. While the object is out of view, the
camera pans at random among the steps that keep it so. The light comes from about the direction of the camera, so the
shadow of the object leaves the view with it: frames without the object depend only on the camera, which is drawn
independently.

Shapes: T frames, H = W image side.
"""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from blueberry_video.data.clips import check_index
from blueberry_video.data.raycast import LIGHT, render
from blueberry_video.data.scene import COLOURS, FOV, HALF_HEIGHT, SHAPES, SIZES, Scene, generator, intrinsics, look_at
from blueberry_video.data.world import FPS, SPLITS

PAN_ACTIONS = ("stay", "left", "right")
PAN_STEP = np.radians(20.0)  # per action
OUT, FARTHEST = 2, 4  # steps from the initial view at which the object is out of view, and the most
DISTANCE, ELEVATION, AZIMUTH = (2.8, 3.2), (np.radians(20.0), np.radians(30.0)), 0.4  # azimuth: around the light's
REACH = np.array([0.40, 0.25])  # meters right and away from the center of the arena
INSIDE, PARTLY, OUTSIDE = 0.92, 0.70, 1.02  # borders of the view, in half widths, at steps 0, 1 and 2


class MemoryWorld(Dataset):
    """Clips of one static object that the camera leaves and returns to; clip `i` is a pure function of (split, i).

    Frames 0 to `seen` - 1 show the object (the last of them at the border), the next `unseen` frames neither the object
    nor its shadow, one frame the object at the border, and the frames from `seen` + `unseen` + 1 on equal frame 0.

    Args:
        split: "train", "val" or "test": three disjoint random streams.
        size: number of clips.
        num_frames: T, at least `seen` + `unseen` + 2; at 8 frames/s.
        image_size: H = W in pixels, at least 8.
        unseen: number of frames without the object, or a list of numbers from which each clip draws.
        seen: frames before these, at least 2. With a tokenizer of temporal stride k, the frames without the object are
            frames of tokens of their own if `seen` is 1 + a multiple of k and `unseen` a multiple of k.
        sizes: sizes of objects, "small" (0.14 to 0.25 of the width of the image) and "large" (0.27 to 0.47).
        supersample: 1 to 8; supersample² rays per pixel for the colour. depth and seg are those of the pixel's center.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 10_000,
        num_frames: int = 25,
        image_size: int = 64,
        unseen: int | Sequence[int] = 16,
        seen: int = 5,
        sizes: Sequence[str] = tuple(SIZES),
        supersample: int = 2,
    ):
        if split not in SPLITS:
            raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}.")
        lengths = (unseen,) if isinstance(unseen, int) else tuple(unseen)
        if not lengths or min(lengths) < 1:
            raise ValueError(f"unseen={unseen} must be at least 1, or a list of such numbers.")
        for key, value, least in (("size", size, 1), ("image_size", image_size, 8), ("seen", seen, 2)):
            if value < least:
                raise ValueError(f"{key}={value} must be at least {least}.")
        if num_frames < (least := seen + max(lengths) + 2):
            raise ValueError(
                f"num_frames={num_frames} must be at least {least} for seen={seen} frames, unseen={max(lengths)} "
                "frames, one step back, and the initial view."
            )
        if not 1 <= supersample <= 8:
            raise ValueError(
                f"supersample={supersample} must be 1 to 8, the number of rays along each side of a pixel."
            )
        self.split, self.size, self.num_frames, self.image_size = split, size, num_frames, image_size
        if isinstance(sizes, str) or not sizes or not set(sizes) <= set(SIZES):
            raise ValueError(f"sizes={sizes!r} must be a list of one or several of {', '.join(SIZES)}.")
        self.unseen, self.seen, self.sizes, self.supersample = lengths, seen, tuple(sizes), supersample
        self.classes: dict[str, tuple[str, ...]] = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES)}
        self.reversal_pairs: dict[str, tuple[tuple[int, int], ...]] = {}
        self.action_names = PAN_ACTIONS

    @property
    def cache_key(self) -> str:
        """Everything that a clip depends on except its index; the number is a version of the generator."""
        return (
            f"memory-1/{self.split}/{self.num_frames}x{self.image_size}/seen={self.seen}"
            f"/unseen={'+'.join(map(str, self.unseen))}/sizes={'+'.join(self.sizes)}/supersample={self.supersample}"
        )

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Clip `index` (`docs/architecture.md`, Clip).

        `actions` (T-1,) int64 are indices of PAN_ACTIONS; action t leads from frame t to t + 1. `visible` (T,) bool is
        False for the frames without the object. `seg` is 0 for sky, 1 for floor, 2 for the object. Raises an IndexError
        outside 0 to size - 1.
        """
        scene, steps = self.scene(index), self._steps(index)
        poses = _pose(scene, steps)
        centres = np.repeat(scene.rest[None], self.num_frames, axis=0)
        video, depth, seg = render(scene, centres, poses, self.image_size, self.supersample)
        return {
            "id": f"memory-{self.split}-{index}",
            "fps": FPS,
            "labels": {
                "shape": SHAPES.index(scene.shapes[0]),
                "colour": list(COLOURS).index(scene.colours[0]),
                "size": list(SIZES).index(scene.sizes[0]),
            },
            "caption": f"a {scene.sizes[0]} {scene.colours[0]} {scene.shapes[0]} stays still on a checkered floor "
            "while the camera pans away and back",
            "video": torch.from_numpy(video),
            "depth": torch.from_numpy(depth),
            "seg": torch.from_numpy(seg),
            "intrinsics": torch.from_numpy(intrinsics(self.image_size)),
            "poses": torch.from_numpy(poses.astype(np.float32)),
            "actions": torch.from_numpy(np.sign(np.diff(steps)) * scene.sweep % 3),  # 1: to the left, counterclockwise
            "visible": torch.from_numpy(steps < OUT),
        }

    def scene(self, index: int) -> Scene:
        """Scene of clip `index`; `sweep` is +1 if the camera pans to the left first. Raises an IndexError outside 0 to
        size - 1."""
        index = operator.index(index)
        check_index(index, self.size)
        return draw_memory_scene((SPLITS[self.split], index), self.sizes)

    def _steps(self, index: int) -> np.ndarray:
        """Steps of the camera from its initial view, (T,) int64."""
        rng = generator(SPLITS[self.split], operator.index(index), 6)
        unseen = int(rng.choice(self.unseen))
        away = [OUT]
        for left in range(unseen - 1, 0, -1):  # the last frame is at OUT again
            low, high = max(OUT, away[-1] - 1), min(FARTHEST, away[-1] + 1, OUT + left - 1)
            away.append(int(rng.integers(low, high + 1)))
        steps = [0] * (self.seen - 1) + [1] + away + [1]
        return np.array(steps + [0] * (self.num_frames - len(steps)))


def draw_memory_scene(seed: Sequence[int], sizes: Sequence[str] = tuple(SIZES)) -> Scene:
    """Draws one static object and a camera. Only the position of the object depends on the rest of the scene."""
    rng = generator(*seed, 5)
    shape, colour, size = (str(rng.choice(list(names))) for names in (SHAPES, COLOURS, sizes))
    scene = Scene(
        seed=tuple(seed),
        shapes=(shape,),
        colours=(colour,),
        sizes=(size,),
        yaw=rng.uniform(0, 2 * np.pi, 1),
        rest=np.array([[0, 0, SIZES[size] * HALF_HEIGHT[shape]]]),
        motion="still",
        phase=0.0,
        azimuth=float(np.arctan2(LIGHT[1], LIGHT[0]) + rng.uniform(-AZIMUTH, AZIMUTH)),
        elevation=float(rng.uniform(*ELEVATION)),
        distance=float(rng.uniform(*DISTANCE)),
        sweep=int(rng.choice([-1, 1])),
        camera="static",
    )
    while True:
        scene.rest[0, :2] = (rng.uniform(-1, 1, 2) * REACH) @ scene.axes
        if _leaves_the_view(scene):
            return scene


def _leaves_the_view(scene: Scene) -> bool:
    """Returns True if the object is inside the view at step 0 and at least partly at step 1, and neither it nor its
    shadow is in view at step 2."""
    body = _surface(scene)
    shadow = body - LIGHT * (body[:, 2:] / LIGHT[2])

    def project(step: int, points: np.ndarray) -> np.ndarray:
        """Camera coordinates in half widths of the view at the depth of the points, times the depth, (n, 3)."""
        pose = _pose(scene, np.array([step]))[0]
        return (points - pose[:3, 3]) @ pose[:3, :3] / [np.tan(FOV / 2), np.tan(FOV / 2), 1]

    x, y, z = project(0, body).T
    inside = (np.maximum(abs(x), abs(y)) < INSIDE * z).all()
    x, _, z = project(1, body).T
    partly = (scene.sweep * x < PARTLY * z).any()  # a pan to the left moves the object to the right
    x, _, z = project(OUT, np.concatenate([body, shadow])).T
    outside = (scene.sweep * x > OUTSIDE * z).all()
    return bool(inside and partly and outside)


def _surface(scene: Scene) -> np.ndarray:
    """Returns points (n, 3) with the convex hull of the object."""
    shape, radius = scene.shapes[0], scene.radii[0]
    count = 4 if shape == "box" else 32
    angle = scene.yaw[0] + np.pi / 4 + 2 * np.pi / count * np.arange(count)
    if shape == "sphere":
        latitude = np.linspace(-np.pi / 2, np.pi / 2, 17)
    else:  # two rims
        latitude = np.array([-1.0, 1.0]) * np.arctan(HALF_HEIGHT[shape])
    stretch = radius / (1.0 if shape == "sphere" else np.cos(latitude[0]))
    height, rim = stretch * np.sin(latitude), stretch * np.cos(latitude)
    angle, rim, height = (part.ravel() for part in np.broadcast_arrays(angle[:, None], rim, height))
    return np.stack([rim * np.cos(angle), rim * np.sin(angle), height], axis=1) + scene.rest[0]


def _pose(scene: Scene, steps: np.ndarray) -> np.ndarray:
    """Returns camera-to-world matrices (n, 4, 4) at steps (n,) of the pan."""
    return look_at(scene.azimuth, scene.elevation, scene.distance, scene.sweep * PAN_STEP * steps)
