"""Baseline of novel views: a copy of the nearest training view."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.evaluation.reconstruction import psnr

TIME_WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)


class NearestViews:
    """PSNR of copying the nearest training view.

    The distance of two views is the distance of the camera centers, divided by ``extent``, plus the angle of the
    optical axes in radians, plus ``w`` times the difference of the times. Each of ``TIME_WEIGHTS`` as ``w`` gives one
    candidate, and the best of them in PSNR counts for each view: no weight that is fixed for all views is better.

    Args:
        views: dataset with ``poses`` (n, 4, 4) and ``times`` (n,).
        extent: size of the scene.
    """

    def __init__(self, views: Any, extent: float):
        self.views, self.extent = views, extent
        self._known: dict[tuple, Tensor] = {}

    def psnr(self, batch: dict) -> Tensor:
        """Returns the PSNR (B,) in dB for views ``video`` (B, 3, 1, H, W) in [0, 1], ``poses`` and ``time``."""
        found = []
        for video, pose, time in zip(batch["video"], batch["poses"][:, 0], batch["time"][:, 0], strict=True):
            key = (float(time), *pose.flatten().tolist(), *video.shape)
            if key not in self._known:
                copies = self.candidates(pose.cpu(), time.cpu())
                images = torch.stack([self._image(index, video) for index in copies])
                real = video[None].expand_as(images)
                self._known[key] = psnr(images * 2 - 1, real * 2 - 1).max()
            found.append(self._known[key])
        return torch.stack(found)

    def candidates(self, pose: Tensor, time: Tensor) -> list[int]:
        """Indices of the nearest training views for the different weights of the time."""
        centers = (self.views.poses[:, :3, 3] - pose[:3, 3]).norm(dim=-1) / self.extent
        angles = F.cosine_similarity(self.views.poses[:, :3, 2], pose[None, :3, 2]).clamp(-1, 1).acos()
        times = (self.views.times - time).abs()
        return sorted({int((centers + angles + weight * times).argmin()) for weight in TIME_WEIGHTS})

    def _image(self, index: int, like: Tensor) -> Tensor:
        """Training view as float (3, 1, H, W) in [0, 1], resized to ``like``."""
        image = self.views[index]["video"].to(like.device).to(like.dtype).div(255)
        if image.shape[-2:] != like.shape[-2:]:
            image = F.interpolate(image, like.shape[-2:], mode="bilinear", antialias=True)
        return image.transpose(0, 1)
