"""Dataset of the views of a scene: pictures with camera poses and times, for reconstruction.

The layout of the folder is found from its files:

    D-NeRF               transforms_{train,val,test}.json
    Nerfies, HyperNeRF   dataset.json, metadata.json, scene.json, camera/<id>.json, rgb/<scale>x/<id>.png
    Neu3D                poses_bounds.npy and a video, or a folder of frames, for each static camera
    COLMAP               images/ and sparse/0/{cameras,images,points3D}.{bin,txt}
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from blueberry_video.data.clips import check_index
from blueberry_video.data.scene_formats import (
    SPLITS,
    colmap_folder,
    is_dnerf,
    is_nerfies,
    is_neu3d,
    read_colmap,
    read_dnerf,
    read_nerfies,
    read_neu3d,
)
from blueberry_video.data.scene_views import PosedScene, check_scene, read_picture, scaled_intrinsics
from blueberry_video.video.resize import resize

BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0)}
LAYOUTS = (
    "transforms_train.json (D-NeRF), dataset.json and camera/ (Nerfies), poses_bounds.npy (Neu3D), or sparse/0/ with "
    "cameras and images (COLMAP)"
)


class SceneFolder(Dataset):
    """Views of one scene as clips of one frame.

    An item has ``video`` uint8 (1, 3, H, W), ``intrinsics`` (3, 3) in pixels, ``poses`` (1, 4, 4) OpenCV
    camera-to-world, ``time`` (1,) from 0 to 1, all float32, and ``id``.

    Args:
        root: folder of the scene, in one of the layouts above.
        split: "train", "val" or "test". Layouts with one set of held-out views have it as both "val" and "test".
        image_size: pixels, one number for a square or (height, width); intrinsics are scaled accordingly. ``None``
            keeps the size of each picture.
        background: "white", "black" or a color (r, g, b) from 0 to 1, blended with transparent pixels.
        images: folder of the pictures below ``root``; for Nerfies and COLMAP only. Defaults to the largest pictures.
        hold_out: every ``hold_out``-th view is held out where the layout does not list held-out views.
        held_out_cameras: cameras of a Neu3D scene that are held out.
        max_frames: frames of each camera of a Neu3D scene; all if ``None``.
        static: sets all times of a COLMAP scene to 0.
        in_memory: keeps pictures in memory after the first reading.

    Attributes:
        views: the views of the split.
        points, colors: point cloud float32 (N, 3) of the scene and its colors (N, 3) from 0 to 1, or ``None``.
        poses, times: float32 (n, 4, 4) and (n,) of the views of the split.

    Raises:
        FileNotFoundError: no folder, or missing pictures.
        ValueError: an argument out of range, an unknown layout, a camera file of another format, a pose that is not
            rigid, a time outside [0, 1], points that no view sees, or no views in the split.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        image_size: int | Sequence[int] | None = None,
        background: str | Sequence[float] = "white",
        images: str | None = None,
        hold_out: int = 8,
        held_out_cameras: Sequence[int] = (0,),
        max_frames: int | None = None,
        static: bool = False,
        in_memory: bool = False,
    ):
        if split not in SPLITS:
            raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}.")
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"image_size={image_size} must be a number of pixels ≥ 1, [height, width], or null.")
        color = BACKGROUNDS.get(background) if isinstance(background, str) else tuple(background)
        if color is None or len(color) != 3 or not all(0 <= value <= 1 for value in color):
            raise ValueError(f"background={background!r} must be 'white', 'black' or [r, g, b] from 0 to 1.")
        if hold_out < 2:
            raise ValueError(f"hold_out={hold_out} must be at least 2: 1 would leave no views to train on.")
        if max_frames is not None and max_frames < 1:
            raise ValueError(f"max_frames={max_frames} must be at least 1, or null for all.")
        self.root, self.split, self.background = Path(root), split, color
        self.image_size = (int(size[0]), int(size[1])) if size is not None else None
        self.classes: dict[str, tuple[str, ...]] = {}
        self.reversal_pairs: dict[str, tuple[tuple[int, int], ...]] = {}
        scene = read_scene(self.root, images, hold_out, held_out_cameras, max_frames, static)
        check_scene(scene, self.root)
        self.layout = scene.layout
        self.views = [view for view in scene.views if split in view.splits]
        if not self.views:
            counts = ", ".join(f"{name} {sum(name in view.splits for view in scene.views)}" for name in SPLITS)
            raise ValueError(
                f"split={split!r} of {self.root} has no views ({counts}): use another split, or more views."
            )
        self.points = torch.from_numpy(scene.points.astype(np.float32)) if len(scene.points) else None
        self.colors = None
        if self.points is not None and scene.colors is not None:
            self.colors = torch.from_numpy(scene.colors.astype(np.float32))
        self._memory: dict[int, Tensor] | None = {} if in_memory else None

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> dict[str, Any]:
        check_index(index, len(self))
        view = self.views[index]
        pixels, size = self._pixels(index)
        return {
            "video": pixels[None],
            "intrinsics": torch.from_numpy(scaled_intrinsics(view.intrinsics, view.size, size).astype(np.float32)),
            "poses": torch.from_numpy(view.pose[None].astype(np.float32)),
            "time": torch.tensor([view.time], dtype=torch.float32),
            "id": view.name,
        }

    @property
    def poses(self) -> Tensor:
        """Camera-to-world poses float32 (n, 4, 4)."""
        return torch.from_numpy(np.stack([view.pose for view in self.views]).astype(np.float32))

    @property
    def times(self) -> Tensor:
        """Times float32 (n,)."""
        return torch.tensor([view.time for view in self.views], dtype=torch.float32)

    @property
    def cache_key(self) -> str:
        """Everything that a view depends on except its index: settings, cameras, and sizes and modification times of
        the files."""
        digest = hashlib.sha256()
        for view in self.views:
            stat = view.path.stat()
            numbers = [view.time, view.intrinsics.tolist(), view.pose.tolist(), view.distortion, view.size, view.frame]
            digest.update(json.dumps([view.name, stat.st_size, stat.st_mtime_ns, numbers]).encode())
        return f"scene-folder-1/{json.dumps([self.image_size, self.background])}/{digest.hexdigest()}"

    def describe(self) -> str:
        """One line about the scene."""
        times = len(set(self.times.tolist()))
        points = "no points" if self.points is None else f"{len(self.points)} points"
        return f"{self.root.name}: {len(self)} {self.split} views at {times} times ({self.layout}, {points})"

    def _pixels(self, index: int) -> tuple[Tensor, tuple[int, int]]:
        """Returns uint8 (3, H, W) and (H, W)."""
        pixels = None if self._memory is None else self._memory.get(index)
        if pixels is None:
            pixels = read_picture(self.views[index], self.background)
            if self.image_size is not None and tuple(pixels.shape[1:]) != self.image_size:
                pixels = resize(pixels[None], self.image_size, "fast", "bilinear")[0].contiguous()
            if self._memory is not None:
                self._memory[index] = pixels
        return pixels, (pixels.shape[1], pixels.shape[2])


def read_scene(
    root: Path,
    images: str | None = None,
    hold_out: int = 8,
    held_out_cameras: Sequence[int] = (0,),
    max_frames: int | None = None,
    static: bool = False,
) -> PosedScene:
    """Reads the cameras of a folder, in the layout that its files have. Arguments as for :class:`SceneFolder`."""
    if not root.is_dir():
        raise FileNotFoundError(f"root={str(root)!r} is not a folder: set it to the folder of a scene.")
    if is_dnerf(root):
        return read_dnerf(root)
    if is_nerfies(root):
        return read_nerfies(root, images, hold_out)
    if is_neu3d(root):
        return read_neu3d(root, max_frames, held_out_cameras)
    if colmap_folder(root):
        return read_colmap(root, images, hold_out, static)
    found = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "no files"
    raise ValueError(f"root={str(root)!r} has {found}: a scene has {LAYOUTS}. Convert the cameras to one of these.")
