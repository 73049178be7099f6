"""Camera paths through a scene: turntable, interpolated cameras, and a fixed camera.

Poses are camera-to-world transforms of OpenCV cameras (x right, y down, z forward).
Shapes: n training cameras, F frames.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.ops.rasterizer.projection import rotations

NEARLY_PARALLEL = 1e-6  # sine of the angle below which a spherical interpolation is linear
RIDGE = 1e-3  # weight of the points one unit ahead of the cameras, for parallel optical axes


class CameraPath(NamedTuple):
    """One camera and time for each frame."""

    poses: Tensor  # (F, 4, 4) float32
    intrinsics: Tensor  # (F, 3, 3) float32, in pixels of image_size
    times: Tensor  # (F,) float32, from 0 to 1
    image_size: tuple[int, int]  # height, width


class Orbit(NamedTuple):
    """Circle around a point, in float64."""

    target: Tensor  # (3,), the point that the cameras look at
    axes: Tensor  # (3, 3), right-handed; columns: the first and second level direction, and the vertical one
    distance: float  # of the cameras from the target
    elevation: float  # radians above the level plane

    def poses(self, azimuths: Tensor) -> Tensor:
        """Poses (F, 4, 4) float32 at angles (F,) in radians from the first level direction."""
        azimuths = azimuths.double()[:, None]
        level, height = math.cos(self.elevation), math.sin(self.elevation)
        outward = level * (azimuths.cos() * self.axes[:, 0] + azimuths.sin() * self.axes[:, 1])
        return look_at(self.target + self.distance * (outward + height * self.axes[:, 2]), self.target, self.axes[:, 2])


def look_at(centers: Tensor, target: Tensor, up: Tensor) -> Tensor:
    """Poses (F, 4, 4) float32 of cameras at ``centers`` (F, 3) that look at ``target`` (3,), upright."""
    ahead = F.normalize(target - centers, dim=-1)
    right = torch.linalg.cross(ahead, up.expand_as(ahead))
    # A camera that looks along the vertical axis takes any level direction.
    other = torch.linalg.cross(ahead, up.roll(1).expand_as(ahead))
    right = F.normalize(torch.where(right.norm(dim=-1, keepdim=True) > NEARLY_PARALLEL, right, other), dim=-1)
    poses = torch.eye(4, dtype=torch.float64).repeat(len(centers), 1, 1)
    poses[:, :3] = torch.stack([right, torch.linalg.cross(ahead, right), ahead, centers], dim=-1)
    return poses.float()


def orbit_of(poses: Tensor) -> Orbit:
    """Orbit of the training cameras.

    The target is the point nearest to the optical axes of all cameras, the vertical axis is the mean of their upward
    directions, distance and elevation are means, and the first level direction is that of the first camera.

    Args:
        poses: (n, 4, 4).
    """
    poses = poses.double().cpu()
    centers, forward = poses[:, :3, 3], F.normalize(poses[:, :3, 2], dim=-1)
    eye = torch.eye(3, dtype=torch.float64)
    across = eye - forward[:, :, None] * forward[:, None]  # projections to the planes across the optical axes
    right_side = (across @ centers[..., None]).mean(0)[:, 0] + RIDGE * (centers + forward).mean(0)
    target = torch.linalg.solve(across.mean(0) + RIDGE * eye, right_side)
    up = -poses[:, :3, 1].mean(0)
    up = F.normalize(up if up.norm() > NEARLY_PARALLEL else -poses[0, :3, 1], dim=0)
    offsets = centers - target
    distances = offsets.norm(dim=-1).clamp(min=1e-6)
    elevation = torch.asin((offsets @ up / distances).clamp(-1, 1)).mean()
    first = offsets[0] - (offsets[0] @ up) * up
    if first.norm() < NEARLY_PARALLEL * distances[0]:
        first = poses[0, :3, 0] - (poses[0, :3, 0] @ up) * up
    first = F.normalize(first, dim=0)
    axes = torch.stack([first, torch.linalg.cross(up, first), up], dim=-1)
    return Orbit(target, axes, float(distances.mean()), float(elevation))


def turntable(poses: Tensor, frames: int) -> Tensor:
    """Poses (F, 4, 4) on one turn around the scene, which begins next to the first camera; see :func:`orbit_of`."""
    return orbit_of(poses).poses(2 * math.pi * torch.arange(frames, dtype=torch.float64) / frames)


def distinct(poses: Tensor, times: Tensor) -> Tensor:
    """Poses (m, 4, 4) without repetitions, in the order of their first time: of a static rig, one for each camera."""
    order = times.argsort(stable=True).tolist()
    return torch.stack(list({tuple(poses[index].flatten().tolist()): poses[index] for index in order}.values()))


def interpolate(values: Tensor, frames: int) -> Tensor:
    """Linear interpolation of m values (m, …) at F equidistant positions from the first to the last, float64."""
    low, weight = _positions(len(values), frames)
    values = values.double()
    weight = weight.view(-1, *[1] * (values.ndim - 1))
    return values[low] * (1 - weight) + values[(low + 1).clamp(max=len(values) - 1)] * weight


def interpolate_poses(poses: Tensor, frames: int) -> Tensor:
    """Interpolates m poses (m, 4, 4) at F equidistant positions from the first to the last: (F, 4, 4) float32.

    Rotations are interpolated spherically, on the shorter arc, and positions linearly.
    """
    poses = poses.double().cpu()
    low, weight = _positions(len(poses), frames)
    high = (low + 1).clamp(max=len(poses) - 1)
    found = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    quats = quaternions(poses[:, :3, :3])
    found[:, :3, :3] = rotations(slerp(quats[low], quats[high], weight))
    found[:, :3, 3] = interpolate(poses[:, :3, 3], frames)
    return found.float()


def slerp(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Spherical linear interpolation of unit quaternions (F, 4) with weights (F,) of the second, on the shorter arc."""
    cosine = (first * second).sum(-1, keepdim=True)
    second, weight = torch.where(cosine < 0, -second, second), weight[:, None]
    # The half-angle formula is exact for small angles, where the arc cosine is not.
    angle = 2 * torch.atan2((first - second).norm(dim=-1, keepdim=True), (first + second).norm(dim=-1, keepdim=True))
    sine = angle.sin()
    spherical = (((1 - weight) * angle).sin() * first + (weight * angle).sin() * second) / sine.clamp(min=1e-30)
    return F.normalize(torch.where(sine > NEARLY_PARALLEL, spherical, first + weight * (second - first)), dim=-1)


def quaternions(matrices: Tensor) -> Tensor:
    """Unit quaternions (…, 4) in the order w, x, y, z of rotation matrices (…, 3, 3)."""
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = (row.unbind(-1) for row in matrices.unbind(-2))
    # Rows of 4 q qᵀ, of which the one with the largest diagonal entry is divided by its norm.
    rows = [
        [1 + xx + yy + zz, zy - yz, xz - zx, yx - xy],
        [zy - yz, 1 + xx - yy - zz, xy + yx, xz + zx],
        [xz - zx, xy + yx, 1 - xx + yy - zz, yz + zy],
        [yx - xy, xz + zx, yz + zy, 1 - xx - yy + zz],
    ]
    products = torch.stack([torch.stack(row, -1) for row in rows], -2)
    largest = products.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    return F.normalize(products.take_along_dim(largest, -2)[..., 0, :], dim=-1)


def scaled_camera(intrinsics: Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """Intrinsics (3, 3) float32 for an image of another size (height, width).

    The vertical field of view is kept; with another aspect ratio, pixels remain square if they are.
    """
    scale = new_size[0] / size[0]
    (fx, _, cx), (_, fy, cy), _ = intrinsics.double().tolist()
    center = (new_size[1] / 2 + (cx - size[1] / 2) * scale, cy * scale)
    return torch.tensor([[fx * scale, 0, center[0]], [0, fy * scale, center[1]], [0, 0, 1]])


def key_times_of(times: str | Sequence[float]) -> list[float]:
    """Key times of a sequence, or of a string such as "0,1".

    Raises:
        ValueError: for no times, or one outside [0, 1].
    """
    try:
        found = [float(time) for time in (times.split(",") if isinstance(times, str) else times)]
    except ValueError:
        found = []
    if not found or not all(0 <= time <= 1 for time in found):  # also for NaN
        raise ValueError(f"times={times} must be numbers in [0, 1]: such as 0.5 for one time, or 0,1 for all of them.")
    return found


def times_of(key_times: Sequence[float], frames: int) -> Tensor:
    """Times (F,) float32 of the frames, interpolated linearly from key times; see :func:`key_times_of`."""
    return interpolate(torch.tensor(key_times_of(key_times)), frames).clamp(0, 1).float()


def _positions(count: int, frames: int) -> tuple[Tensor, Tensor]:
    """Index (F,) below, and weight (F,) float64 of the next one, of equidistant positions among ``count`` values."""
    if frames < 1:
        raise ValueError(f"frames={frames} must be at least 1.")
    positions = torch.arange(frames, dtype=torch.float64) * (count - 1) / max(frames - 1, 1)
    low = positions.floor().long().clamp(max=count - 1)
    return low, positions - low
