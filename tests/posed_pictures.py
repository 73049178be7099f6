"""Poses and pictures of small scenes, for tests."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIZE = (6, 8)  # height, width of the pictures


def rotation(x: float, y: float, z: float) -> np.ndarray:
    skew = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    return torch.linalg.matrix_exp(skew).numpy()


def poses(count: int) -> list[np.ndarray]:
    """Camera-to-world poses at a distance of 4, which view the origin."""
    found = []
    for i in range(count):
        pose = np.eye(4)
        pose[:3, :3] = rotation(0.02 * i, 0.3 * i, 0.1)
        pose[:3, 3] = -4 * pose[:3, 2]
        found.append(pose)
    return found


def picture(path: Path, value: int = 100, size: tuple[int, int] = SIZE, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size[::-1], (value, 50, 200, 128)[: len(mode)] if len(mode) > 1 else value).save(path)
