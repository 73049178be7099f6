"""Readers of posed scenes: D-NeRF, Nerfies and HyperNeRF, Neu3D, and pictures with a COLMAP model.

Each returns the views of all splits. Where a layout has one set of held-out views, it is both "val" and "test".
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blueberry_video.data.colmap import is_colmap_model, read_colmap_model
from blueberry_video.data.scene_views import PosedScene, View, evenly_spaced, natural_key
from blueberry_video.video.container import probe
from blueberry_video.video.frame_list import opened_image, readable

SPLITS = ("train", "val", "test")
HELD_OUT = ("val", "test")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
OPENGL = np.diag([1.0, -1, -1, 1])  # between OpenGL cameras (y up, z backwards) and OpenCV cameras


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises a ValueError that names the file if it is of another format."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: copy it there, or use another layout.") from None
    except ValueError as error:  # also for bytes that are not UTF-8
        raise ValueError(f"{path} is not JSON ({error}): it must be a camera file of its layout.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} has a {type(found).__name__} and must have an object with keys: use another layout.")
    return found


def entry(table: Any, key: str, path: Path, kind: type | tuple[type, ...], meaning: str) -> Any:
    """Returns ``table[key]``; raises a ValueError if it is missing or not of a type."""
    value = table.get(key) if isinstance(table, dict) else None
    if value is None or not isinstance(value, kind) or isinstance(value, bool):
        keys = ", ".join(sorted(table)[:8]) if isinstance(table, dict) else type(table).__name__
        problem = f"has no {key}" if value is None else f"has {key}={value!r}"
        raise ValueError(f"{path} {problem} (keys: {keys}): it must be {meaning}; the file is of another format.")
    return value


def numeric(table: Any, key: str, path: Path, meaning: str, default: float | None = None) -> float:
    """Returns the number ``table[key]``, or ``default`` if it is missing; raises a ValueError as :func:`entry`."""
    if default is not None and table.get(key) is None:
        return default
    return float(entry(table, key, path, (int, float), meaning))


def matrix(value: Any, shape: tuple[int, ...], key: str, source: str) -> np.ndarray:
    """Returns an array of numbers of a shape; raises a ValueError otherwise."""
    try:
        found = np.array(value, np.float64)
    except (TypeError, ValueError):
        found = np.zeros(0)
    if found.shape != shape:
        raise ValueError(f"{key}={value!r} of {source} must be {' x '.join(map(str, shape))} numbers.")
    return found


# ---- D-NeRF ----------------------------------------------------------------------------------------------------------


def is_dnerf(root: Path) -> bool:
    return (root / "transforms_train.json").is_file()


def read_dnerf(root: Path) -> PosedScene:
    """``transforms_{train,val,test}.json``: horizontal field of view, and file, time and OpenGL pose of each frame.

    Times are 0 where no frame has one. ``fl_x, fl_y, cx, cy, w, h`` and ``k1, k2, p1, p2`` have precedence over
    ``camera_angle_x``, in a frame or in the file.
    """
    views, timed = [], []
    for split in SPLITS:
        path = root / f"transforms_{split}.json"
        if split != "train" and not path.is_file():
            continue
        table = read_json(path)
        frames = entry(table, "frames", path, list, "a list of frames")
        size: tuple[int, int] | None = None
        for number, frame in enumerate(frames):
            source = f"frames[{number}] of {path}"
            file = entry(frame, "file_path", path, str, "the path of a picture")
            pose = entry(frame, "transform_matrix", path, list, "a 4 x 4 matrix")
            picture = _picture(root / file)
            settings = {**table, **frame}
            if "w" in settings and "h" in settings:
                size = (int(numeric(settings, "h", path, "pixels")), int(numeric(settings, "w", path, "pixels")))
            elif size is None and picture.is_file():
                with readable(str(picture)), opened_image(picture) as image:
                    size = image.size[::-1]
            timed.append(frame.get("time") is not None)
            distortion = [numeric(settings, key, path, "a distortion", 0.0) for key in ("k1", "k2", "p1", "p2", "k3")]
            views.append(
                View(
                    name=f"{split}/{Path(file).name}",
                    path=picture,
                    splits=(split,),
                    time=numeric(frame, "time", Path(source), "a number in [0, 1]", 0.0),
                    intrinsics=dnerf_intrinsics(settings, size or (1, 1), path),
                    pose=matrix(pose, (4, 4), "transform_matrix", source) @ OPENGL,
                    size=size or (1, 1),  # of a missing picture, which the checks report
                    source=source,
                    distortion=tuple(distortion),  # type: ignore[arg-type]
                )
            )
    if any(timed) and not all(timed):
        raise ValueError(
            f"{timed.count(False)} of the {len(timed)} frames in {root} have no time: add it to all, or to none."
        )
    return PosedScene("D-NeRF", views)


def dnerf_intrinsics(settings: dict[str, Any], size: tuple[int, int], path: Path) -> np.ndarray:
    height, width = size
    if "fl_x" in settings:
        fx = numeric(settings, "fl_x", path, "a focal length in pixels")
        fy = numeric(settings, "fl_y", path, "a focal length in pixels", fx)
    else:
        angle = numeric(settings, "camera_angle_x", path, "the horizontal field of view in radians")
        if not 0 < angle < math.pi:
            raise ValueError(f"camera_angle_x={angle} of {path} must be in radians, above 0 and below π.")
        fx = fy = 0.5 * width / np.tan(angle / 2)
    center = [numeric(settings, key, path, "pixels", side / 2) for key, side in (("cx", width), ("cy", height))]
    return np.array([[fx, 0, center[0]], [0, fy, center[1]], [0, 0, 1]])


def _picture(path: Path) -> Path:
    """The path itself, or with the first suffix of a picture that exists; D-NeRF omits it."""
    if path.is_file() or path.suffix.lower() in PICTURES:
        return path
    candidates = [path.with_name(path.name + suffix) for suffix in PICTURES]
    return next((candidate for candidate in candidates if candidate.is_file()), candidates[0])


# ---- Nerfies and HyperNeRF -------------------------------------------------------------------------------------------


def is_nerfies(root: Path) -> bool:
    return (root / "dataset.json").is_file() and (root / "camera").is_dir()


def read_nerfies(root: Path, images: str | None = None, hold_out: int = 8) -> PosedScene:
    """``dataset.json, metadata.json, scene.json, camera/<id>.json, rgb/<scale>x/<id>.png`` and optional ``points.npy``.

    Times are ``warp_id`` (or ``time_id``) divided by their maximum. Positions are centered and scaled as in
    ``scene.json``. Without ``val_ids``, every ``hold_out``-th picture is held out.
    """
    table, metadata, scene = (read_json(root / f"{name}.json") for name in ("dataset", "metadata", "scene"))
    ids = [str(name) for name in entry(table, "ids", root / "dataset.json", list, "a list of names")]
    held_out = {str(name) for name in table.get("val_ids") or ids[hold_out // 2 :: hold_out]}
    training = {str(name) for name in table.get("train_ids") or ids} - held_out
    center = matrix(scene.get("center"), (3,), "center", str(root / "scene.json"))
    scale = numeric(scene, "scale", root / "scene.json", "a number")
    folder = root / (images or _largest(root / "rgb"))
    frames = {}
    for name in ids:
        if name in training or name in held_out:
            facts = entry(metadata, name, root / "metadata.json", dict, "the numbers of a picture")
            key = "warp_id" if "warp_id" in facts else "time_id"
            frames[name] = entry(facts, key, root / "metadata.json", int, f"the number of a frame, for {name}")
    last = max(frames.values(), default=0)
    views = []
    for name, frame in frames.items():
        path = root / "camera" / f"{name}.json"
        camera = read_json(path)
        pose = np.eye(4)
        pose[:3, :3] = matrix(camera.get("orientation"), (3, 3), "orientation", str(path)).T
        pose[:3, 3] = (matrix(camera.get("position"), (3,), "position", str(path)) - center) * scale
        focal = numeric(camera, "focal_length", path, "a number of pixels")
        middle = matrix(camera.get("principal_point"), (2,), "principal_point", str(path))
        width, height = matrix(camera.get("image_size"), (2,), "image_size", str(path)).astype(int).tolist()
        skew, aspect = numeric(camera, "skew", path, "0", 0.0), numeric(camera, "pixel_aspect_ratio", path, "1", 1.0)
        radial = matrix(camera.get("radial_distortion") or [0, 0, 0], (3,), "radial_distortion", str(path))
        tangential = matrix(camera.get("tangential_distortion") or [0, 0], (2,), "tangential_distortion", str(path))
        views.append(
            View(
                name=name,
                path=_picture(folder / name),
                splits=("train",) if name in training else HELD_OUT,
                time=frame / last if last else 0.0,
                intrinsics=np.array([[focal, skew, middle[0]], [0, focal * aspect, middle[1]], [0, 0, 1]]),
                pose=pose,
                size=(height, width),
                source=str(path),
                distortion=(*radial[:2], *tangential, radial[2]),
            )
        )
    points = np.zeros((0, 3))
    if (root / "points.npy").is_file():
        points = (read_array(root / "points.npy", 3) - center) * scale
    return PosedScene("Nerfies", views, points)


def read_array(path: Path, columns: int) -> np.ndarray:
    """Reads a float64 array (N, columns) from a .npy file without pickled objects."""
    try:
        array = np.asarray(np.load(path, allow_pickle=False), np.float64)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as an array of numbers ({error}): write it with numpy.save."
        ) from error
    if array.ndim != 2 or array.shape[1] != columns:
        raise ValueError(f"{path} has shape {array.shape}: it must be (N, {columns}); the file is of another format.")
    return array


def _largest(folder: Path) -> str:
    """The folder ``rgb/<scale>x`` with the smallest scale, which has the largest pictures."""
    scales = {int(path.name[:-1]): path for path in folder.glob("*x") if path.name[:-1].isdecimal()}
    if not scales:
        raise FileNotFoundError(f"{folder} has no folder of pictures such as 2x: copy it there, or set images=….")
    return f"{folder.name}/{scales[min(scales)].name}"


# ---- Neu3D -----------------------------------------------------------------------------------------------------------


def is_neu3d(root: Path) -> bool:
    return (root / "poses_bounds.npy").is_file()


def read_neu3d(root: Path, max_frames: int | None = None, held_out_cameras: Sequence[int] = (0,)) -> PosedScene:
    """``poses_bounds.npy`` with a row per static camera, and a video or a folder of frames for each, sorted by name.

    A row is a 3 x 5 matrix, of which the columns are down, right, backwards, position and (height, width, focal
    length), and two depth bounds. Frame i of T has the time i / (T - 1).
    """
    rows = read_array(root / "poses_bounds.npy", 17)
    videos = sorted((p for p in root.iterdir() if p.suffix.lower() in VIDEOS), key=lambda p: natural_key(p.name))
    cameras: list[list[tuple[Path, int | None]]] = [
        [(path, frame) for frame in range(probe(path).num_frames)] for path in videos
    ]
    names = [path.stem for path in videos]
    if not videos:
        for folder in sorted((p for p in root.iterdir() if p.is_dir()), key=lambda p: natural_key(p.name)):
            inner = folder / "images" if (folder / "images").is_dir() else folder
            pictures = [path for path in inner.iterdir() if path.suffix.lower() in PICTURES]
            if pictures:
                names.append(folder.name)
                cameras.append([(path, None) for path in sorted(pictures, key=lambda p: natural_key(p.name))])
    if len(cameras) != len(rows):
        raise ValueError(
            f"{root} has {len(cameras)} videos or folders of frames and {len(rows)} rows in poses_bounds.npy: there "
            "must be one for each camera, in the order of their names; copy missing videos, or remove rows."
        )
    lengths = [len(frames) if max_frames is None else min(len(frames), max_frames) for frames in cameras]
    if len(set(lengths)) > 1:
        shortest = names[lengths.index(min(lengths))]
        raise ValueError(
            f"the cameras in {root} have {min(lengths)} to {max(lengths)} frames, the fewest {shortest}: cameras are "
            f"synchronous, so that all have the same number; set max_frames={min(lengths)}."
        )
    outside = [number for number in held_out_cameras if not 0 <= number < len(rows)]
    if outside:
        raise ValueError(f"held_out_cameras={list(held_out_cameras)} must be 0 to {len(rows) - 1}, indices of cameras.")
    views = []
    for number, (row, name, frames) in enumerate(zip(rows, names, cameras, strict=True)):
        table = row[:15].reshape(3, 5)
        pose = np.eye(4)
        pose[:3] = np.stack([table[:, 1], table[:, 0], -table[:, 2], table[:, 3]], 1)
        height, width, focal = table[:, 4]
        for index, (path, frame) in enumerate(frames[: lengths[number]]):
            views.append(
                View(
                    name=f"{name}/{index:05d}",
                    path=path,
                    splits=HELD_OUT if number in held_out_cameras else ("train",),
                    time=evenly_spaced(index, lengths[number]),
                    intrinsics=np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]),
                    pose=pose,
                    size=(int(height), int(width)),
                    source=f"row {number} of {root / 'poses_bounds.npy'}",
                    frame=frame,
                )
            )
    return PosedScene("Neu3D", views)


# ---- COLMAP ----------------------------------------------------------------------------------------------------------


def colmap_folder(root: Path) -> Path | None:
    """Folder of the COLMAP model of a scene, or ``None``."""
    folders = (root / "sparse" / "0", root / "sparse", root / "colmap" / "sparse" / "0", root)
    return next((folder for folder in folders if is_colmap_model(folder)), None)


def read_colmap(root: Path, images: str | None = None, hold_out: int = 8, static: bool = False) -> PosedScene:
    """Pictures in ``images/`` and a COLMAP model in ``sparse/0/``; every ``hold_out``-th picture is held out.

    Pictures in one folder are frames of one moving camera in the order of their names: frame i of T has the time
    i / (T - 1). Each sub-folder is a separate camera. ``static`` sets all times to 0.
    """
    folder = colmap_folder(root)
    assert folder is not None
    model = read_colmap_model(folder)
    names: dict[str, list[str]] = {}
    for image in model.images:
        names.setdefault(str(Path(image.name).parent), []).append(image.name)
    times: dict[str, float] = {}
    held_out: set[str] = set()
    for group in names.values():
        group.sort(key=natural_key)
        times |= {name: 0.0 if static else evenly_spaced(i, len(group)) for i, name in enumerate(group)}
        held_out |= set(group[hold_out // 2 :: hold_out])
    views = []
    for image in sorted(model.images, key=lambda image: natural_key(image.name)):
        camera = model.cameras[image.camera_id]
        views.append(
            View(
                name=image.name,
                path=root / (images or "images") / image.name,
                splits=HELD_OUT if image.name in held_out else ("train",),
                time=times[image.name],
                intrinsics=camera.intrinsics,
                pose=image.pose,
                size=camera.size,
                source=f"{image.name} in {folder}",
                distortion=camera.distortion,
            )
        )
    return PosedScene("COLMAP", views, model.points, model.colors)
