"""Rendering of a trained scene along a camera path, frame by frame at constant memory.

Shapes: n training cameras, F frames, H x W pixels.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from blueberry_video.inference.camera_paths import (
    CameraPath,
    distinct,
    interpolate,
    interpolate_poses,
    scaled_camera,
    times_of,
    turntable,
)
from blueberry_video.models.gaussian_splatting import Camera, GaussianSplatting4D

PATHS = ("turntable", "train", "fixed")
FRAMES = 120
COLORS = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0)}


class TrainedScene(NamedTuple):
    """Trained model of a scene and its training cameras."""

    model: GaussianSplatting4D
    poses: Tensor  # (n, 4, 4) OpenCV camera-to-world
    times: Tensor  # (n,) from 0 to 1
    intrinsics: Tensor  # (3, 3) of the first camera, in pixels of image_size
    image_size: tuple[int, int]  # height, width
    background: Tensor  # (3,) from 0 to 1

    def fingerprint(self) -> str:
        """Hash of the weights and the training cameras."""
        found = hashlib.sha256()
        cameras = {"poses": self.poses, "times": self.times, "intrinsics": self.intrinsics}
        for name, tensor in sorted({**self.model.state_dict(), **cameras}.items()):
            found.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]


def camera_path(
    scene: TrainedScene,
    path: str = "turntable",
    image_size: tuple[int, int] | None = None,
    frames: int | None = None,
    times: Sequence[float] = (0.0, 1.0),
    camera: int = 0,
) -> CameraPath:
    """Returns a path derived from the training cameras.

    Args:
        path: ``turntable``: one turn around the point that the cameras look at; ``train``: interpolation of the
            cameras, in the order of their times; ``fixed``: one camera.
        image_size: height and width; ``None``: those of training.
        frames: number of frames; ``None``: 120.
        times: key times, interpolated linearly over the frames: 0 and 1 for running time, one number for a fixed time.
        camera: index of the training camera of ``fixed``.

    Raises:
        ValueError: for an unknown path, or a number out of range.
    """
    frames = FRAMES if frames is None else frames
    if frames < 1:
        raise ValueError(f"frames={frames} must be at least 1.")
    if path == "turntable":
        poses = turntable(scene.poses, frames)
    elif path == "train":
        poses = interpolate_poses(distinct(scene.poses, scene.times), frames)
    elif path == "fixed":
        if not 0 <= camera < len(scene.poses):
            raise ValueError(f"camera={camera} must be 0 to {len(scene.poses) - 1}, an index of a training camera.")
        poses = scene.poses[camera].expand(frames, 4, 4).float()
    else:
        raise ValueError(f"path={path!r} must be {', '.join(PATHS)}, or a .json file with cameras.")
    size = scene.image_size if image_size is None else image_size
    intrinsics = scaled_camera(scene.intrinsics, scene.image_size, size)
    return CameraPath(poses, intrinsics.expand(frames, 3, 3), times_of(times, frames), size)


def path_of_cameras(
    poses: ArrayLike,
    intrinsics: ArrayLike,
    times: ArrayLike,
    image_size: tuple[int, int],
    frames: int | None = None,
    key_times: Sequence[float] | None = None,
) -> CameraPath:
    """Path of given cameras, interpolated to a number of frames; ``key_times`` replace their times.

    Args:
        poses, intrinsics, times: (m, 4, 4), (m, 3, 3) in pixels of ``image_size`` and (m,).
        frames: ``None``: m, without interpolation.
        key_times: see :func:`camera_path`.

    Raises:
        ValueError: for a number out of range.
    """
    given = [torch.as_tensor(np.asarray(value)).float() for value in (poses, intrinsics, times)]
    if frames is not None:
        given = [interpolate_poses(given[0], frames), *(interpolate(value, frames).float() for value in given[1:])]
    path = CameraPath(given[0], given[1], given[2], image_size)
    return path if key_times is None else path._replace(times=times_of(key_times, len(path.poses)))


def color_of(background: str | Sequence[float]) -> Tensor:
    """Color (3,) of "white", "black", or three numbers from 0 to 1, which may be a string such as "0.5,0.5,1".

    Raises:
        ValueError: for others.
    """
    color: Sequence[float] = ()
    if not isinstance(background, str):
        color = background
    elif background in COLORS:
        color = COLORS[background]
    else:
        with contextlib.suppress(ValueError):
            color = [float(part) for part in background.split(",")]
    if len(color) != 3 or not all(0 <= value <= 1 for value in color):
        raise ValueError(
            f"background={background} must be white, black or three numbers from 0 to 1, such as 0.5,0.5,1."
        )
    return torch.tensor(list(color), dtype=torch.float32)


def size_of(size: str | Sequence[int] | None, default: tuple[int, int], even: bool) -> tuple[int, int]:
    """Height and width of images.

    Args:
        size: height, or height and width, also as a string such as "256x384"; ``None`` for ``default``. The width
            defaults to the ratio of ``default``.
        even: raises for odd numbers, which an mp4 file cannot have; a width that is computed is rounded to even.

    Raises:
        ValueError: for a size of another form, or out of range.
    """
    try:
        given = [int(side) for side in (size.split("x") if isinstance(size, str) else size or default)]
    except ValueError:
        given = []
    if len(given) == 1:
        step = 2 if even else 1
        given.append(max(step, step * round(given[0] * default[1] / default[0] / step)))
    if len(given) != 2 or min(given) < 1:
        raise ValueError(f"size={size} must be a height, or a height and a width, at least 1: such as 256 or 256x384.")
    height, width = given
    if even and (height % 2 or width % 2):
        raise ValueError(
            f"size={height}x{width} must be even for format=mp4: use {height + height % 2}x{width + width % 2}."
        )
    return height, width


@torch.no_grad()
def render_frames(model: GaussianSplatting4D, path: CameraPath, background: Tensor | None = None) -> Iterator[Tensor]:
    """Yields the frames float32 (3, H, W) in [0, 1] of a path; no frame is kept.

    Args:
        background: (3,) from 0 to 1; black if ``None``.
    """
    device = model.gaussians.means.device
    background = None if background is None else background.to(device)
    for pose, intrinsics, time in zip(path.poses, path.intrinsics, path.times.tolist(), strict=True):
        camera = Camera.from_pose(pose.to(device), intrinsics.to(device), path.image_size)
        yield model.render(camera, time, background).color.clamp(0, 1)
