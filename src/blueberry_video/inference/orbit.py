"""Camera path on a circle around a scene, derived from its cameras."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def orbit(poses: Tensor, count: int) -> Tensor:
    """Returns ``count`` camera-to-world poses (count, 4, 4) on a circle that begins near the first camera.

    The center is the point nearest to the optical axes of all cameras, the vertical axis is the mean of their upward
    directions, and height and radius are medians of the cameras.

    Args:
        poses: (n, 4, 4) OpenCV camera-to-world.
        count: number of poses, at least 1.
    """
    poses = poses.double()
    centers, forward = poses[:, :3, 3], F.normalize(poses[:, :3, 2], dim=-1)
    up = F.normalize(-poses[:, :3, 1].mean(0), dim=0)
    eye = torch.eye(3, dtype=torch.float64)
    across = eye - forward[:, :, None] * forward[:, None]  # projections to the planes across the optical axes
    # The ridge pulls towards the mean of points one unit ahead, for parallel axes.
    ridge = 1e-3 * len(poses)
    target = torch.linalg.solve(
        across.sum(0) + ridge * eye, (across @ centers[..., None]).sum(0)[:, 0] + ridge * (centers + forward).mean(0)
    )
    offsets = centers - target
    heights = offsets @ up
    level = offsets - heights[:, None] * up
    height, radius = heights.median(), level.norm(dim=-1).median().clamp(min=1e-6)
    east = F.normalize(level[0], dim=0) if level[0].norm() > 1e-6 else F.normalize(poses[0, :3, 0], dim=0)
    north = torch.linalg.cross(up, east)
    angle = 2 * math.pi * torch.arange(count, dtype=torch.float64)[:, None] / count
    places = target + height * up + radius * (angle.cos() * east + angle.sin() * north)
    ahead = F.normalize(target - places, dim=-1)
    right = F.normalize(torch.linalg.cross(ahead, up.expand_as(ahead)), dim=-1)
    found = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    found[:, :3] = torch.stack([right, torch.linalg.cross(ahead, right), ahead, places], dim=-1)
    return found.float()
