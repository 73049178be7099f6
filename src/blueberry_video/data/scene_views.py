"""Views of a posed scene: one picture with camera and time each, their checks, and the reading of their pixels.

Poses are camera-to-world transforms of OpenCV cameras (x right, y down, z forward). Pixel centers are at 0.5, 1.5, …
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.video.decode import DecodeOptions, decode
from blueberry_video.video.errors import BrokenVideoError
from blueberry_video.video.frame_list import Pictures, opened_image, readable
from blueberry_video.video.source_options import SourceOptions

RIGID_TOLERANCE = 1e-3  # of the entries of R Rᵀ
ASPECT_TOLERANCE = 0.01  # of the aspect ratio of a picture and of its camera, for sizes that were rounded


@dataclass(frozen=True)
class View:
    """One picture of a scene.

    Attributes:
        name: unique name, such as the path below the root.
        path: image file, or video file.
        splits: splits that contain the view, of "train", "val" and "test".
        time: in [0, 1].
        intrinsics: (3, 3) float64, in pixels of ``size``.
        pose: (4, 4) float64.
        size: height and width of the camera; a picture of another resolution and the same aspect ratio is accepted.
        source: camera file and entry, for messages.
        frame: index of a frame of a video; ``None`` for an image.
        distortion: k1, k2, p1, p2, k3 of Brown's model.
    """

    name: str
    path: Path
    splits: tuple[str, ...]
    time: float
    intrinsics: np.ndarray
    pose: np.ndarray
    size: tuple[int, int]
    source: str
    frame: int | None = None
    distortion: tuple[float, float, float, float, float] = (0, 0, 0, 0, 0)


@dataclass(frozen=True)
class PosedScene:
    """Views of a scene and, where the folder has one, a point cloud."""

    layout: str
    views: list[View]
    points: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))  # (N, 3)
    colors: np.ndarray | None = None  # (N, 3) from 0 to 1


def check_scene(scene: PosedScene, root: Path) -> None:
    """Checks poses, cameras, times, files and points.

    Raises:
        ValueError: no views, a pose that is not rigid, a time outside [0, 1], an invalid camera, or points of which no
            training view sees any.
        FileNotFoundError: for missing pictures.
    """
    if not scene.views:
        raise ValueError(f"{root} has the layout of {scene.layout} and 0 views: its camera files list no pictures.")
    for view in scene.views:
        check_pose(view)
        check_intrinsics(view)
        if not 0 <= view.time <= 1:  # also for NaN
            raise ValueError(
                f"time={view.time} of {view.source} must be in [0, 1]: divide frame indices by the number of frames "
                "- 1."
            )
    missing = sorted({str(view.path) for view in scene.views if not view.path.is_file()})
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(scene.views)} pictures that the camera files in {root} list are missing, such "
            f"as {missing[0]}: copy them there, or remove their entries."
        )
    _check_points(scene, root)


def check_pose(view: View) -> None:
    pose = view.pose
    if pose.shape != (4, 4) or not np.isfinite(pose).all():
        raise ValueError(f"the pose of {view.source} must be a 4 x 4 matrix of finite numbers, not {pose.tolist()}.")
    turn = pose[:3, :3]
    error, determinant = np.abs(turn @ turn.T - np.eye(3)).max(), np.linalg.det(turn)
    if error > RIGID_TOLERANCE or determinant < 0 or pose[3].tolist() != [0, 0, 0, 1]:
        raise ValueError(
            f"the pose of {view.source} is not rigid: R Rᵀ differs from I by {error:.3g}, det R = {determinant:.3g}, "
            f"last row {pose[3].tolist()}. It must be [[R, t], [0, 0, 0, 1]] with a rotation R: remove scaling, shear "
            "and mirroring from the camera file."
        )


def check_intrinsics(view: View) -> None:
    (fx, skew, _), (tilt, fy, _), last = view.intrinsics.tolist()
    finite = np.isfinite(view.intrinsics).all()
    if not finite or fx <= 0 or fy <= 0 or skew or tilt or last != [0, 0, 1] or min(view.size) < 1:
        raise ValueError(
            f"intrinsics={view.intrinsics.tolist()} of {view.source}, of {view.size[0]} x {view.size[1]} pixels "
            "(height x width), must be [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] with fx, fy > 0 and no skew: rectify the "
            "pictures first."
        )


def _check_points(scene: PosedScene, root: Path) -> None:
    if not len(scene.points):
        return
    cameras = {(view.pose.tobytes(), view.intrinsics.tobytes()): view for view in scene.views if "train" in view.splits}
    for view in cameras.values():
        local = (scene.points - view.pose[:3, 3]) @ view.pose[:3, :3]
        x, y, z = (local[local[:, 2] > 0] @ view.intrinsics.T).T
        if ((x >= 0) & (x <= z * view.size[1]) & (y >= 0) & (y <= z * view.size[0])).any():
            return
    raise ValueError(
        f"none of the {len(scene.points)} points of {root} is in view of any of the {len(cameras)} training cameras: "
        "points and poses are in different units or axes. Export both from one reconstruction, or remove the points."
    )


def read_picture(view: View, background: Sequence[float]) -> Tensor:
    """Reads uint8 (3, H, W) RGB; transparent pixels are blended over a background from 0 to 1.

    Raises:
        BrokenVideoError: the file cannot be read, or its aspect ratio is not that of the camera.
    """
    if view.frame is not None:
        pixels = decode(view.path, [view.frame], DecodeOptions(num_threads=1)).pixels[0].contiguous()
    else:
        pixels = _read_image(view.path, background)
    height, width = pixels.shape[1:]
    if abs(height / view.size[0] * view.size[1] / width - 1) > ASPECT_TOLERANCE:
        raise BrokenVideoError(
            f"{view.path} is {height} x {width} (height x width), but its camera in {view.source} is {view.size[0]} x "
            f"{view.size[1]}: resize the picture to the aspect ratio of the camera, or correct the camera file."
        )
    if any(view.distortion):
        pixels = undistort(pixels, scaled_intrinsics(view.intrinsics, view.size, (height, width)), view.distortion)
    return pixels


def _read_image(path: Path, background: Sequence[float]) -> Tensor:
    with readable(str(path)), opened_image(path) as image:
        if image.has_transparency_data:
            rgba = np.asarray(image.convert("RGBA")).astype(np.float32)
            alpha = rgba[..., 3:] / 255
            blended = rgba[..., :3] * alpha + 255 * np.asarray(background, np.float32) * (1 - alpha)
            return torch.from_numpy(blended.round().astype(np.uint8)).permute(2, 0, 1).contiguous()
    return Pictures([path], str(path), SourceOptions()).read([0])[0]


def scaled_intrinsics(intrinsics: np.ndarray, size: tuple[int, int], new_size: tuple[int, int]) -> np.ndarray:
    """Intrinsics (3, 3) of the same camera for pictures of another size (height, width)."""
    if tuple(size) == tuple(new_size):
        return intrinsics
    return np.array([[new_size[1] / size[1]], [new_size[0] / size[0]], [1.0]]) * intrinsics


def undistort(pixels: Tensor, intrinsics: np.ndarray, distortion: Sequence[float]) -> Tensor:
    """Resamples a picture uint8 (3, H, W) of a camera with Brown distortion to a pinhole camera of the same intrinsics.

    Pixels outside the source repeat its border.
    """
    k1, k2, p1, p2, k3 = distortion
    height, width = pixels.shape[1:]
    (fx, _, cx), (_, fy, cy) = intrinsics[:2].tolist()
    x = ((torch.arange(width, dtype=torch.float64) + 0.5 - cx) / fx)[None]
    y = ((torch.arange(height, dtype=torch.float64) + 0.5 - cy) / fy)[:, None]
    square = x * x + y * y
    radial = 1 + square * (k1 + square * (k2 + square * k3))
    across = x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x)
    down = y * radial + p1 * (square + 2 * y * y) + 2 * p2 * x * y
    grid = torch.stack([(fx * across + cx) / width, (fy * down + cy) / height], -1) * 2 - 1
    image = F.grid_sample(pixels[None].double(), grid[None], padding_mode="border", align_corners=False)[0]
    return image.round().to(torch.uint8)


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Sort key that orders numbers in names by value: 2.png before 10.png."""
    parts = re.split(r"([0-9]+)", name.lower())  # text and numbers alternate
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], name


def evenly_spaced(index: int, count: int) -> float:
    """Time of frame ``index`` of ``count`` frames, from 0 to 1."""
    return index / (count - 1) if count > 1 else 0.0
