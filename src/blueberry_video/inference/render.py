"""Rendering of a trained scene along a camera path, frame by frame at constant memory.

Shapes: n training cameras, F frames, H x W pixels.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
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


class TrainedScene(NamedTuple):
    """Trained model of a scene and its training cameras."""

    model: GaussianSplatting4D
    poses: Tensor  # (n, 4, 4) OpenCV camera-to-world
    times: Tensor  # (n,) from 0 to 1
    intrinsics: Tensor  # (3, 3) of the first camera, in pixels of image_size
    image_size: tuple[int, int]  # height, width
    background: Tensor  # (3,) from 0 to 1


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


def resampled(path: CameraPath, frames: int | None = None, times: Sequence[float] | None = None) -> CameraPath:
    """Interpolates a path to another number of frames; ``times`` replaces its times by key times."""
    if frames is not None:
        poses, intrinsics = interpolate_poses(path.poses, frames), interpolate(path.intrinsics, frames).float()
        path = CameraPath(poses, intrinsics, interpolate(path.times, frames).float(), path.image_size)
    return path if times is None else path._replace(times=times_of(times, len(path.poses)))


@torch.no_grad()
def render_frames(
    model: GaussianSplatting4D, path: CameraPath, background: Tensor | None = None, start: int = 0
) -> Iterator[Tensor]:
    """Yields the frames float32 (3, H, W) in [0, 1] of a path; no frame is kept.

    Args:
        background: (3,) from 0 to 1; black if ``None``.
        start: index of the first frame.
    """
    device = model.gaussians.means.device
    background = None if background is None else background.to(device)
    for pose, intrinsics, time in zip(path.poses[start:], path.intrinsics[start:], path.times[start:].tolist()):
        camera = Camera.from_pose(pose.to(device), intrinsics.to(device), path.image_size)
        yield model.render(camera, time, background).color.clamp(0, 1)
