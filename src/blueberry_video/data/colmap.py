"""Reader of COLMAP models: cameras, images and points3D, as text or binary files (colmap.github.io/format.html)."""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

PARAMETERS = {  # number of parameters by model, in the order of their ids
    "SIMPLE_PINHOLE": 3,
    "PINHOLE": 4,
    "SIMPLE_RADIAL": 4,
    "RADIAL": 5,
    "OPENCV": 8,
    "OPENCV_FISHEYE": 8,
    "FULL_OPENCV": 12,
    "FOV": 5,
    "SIMPLE_RADIAL_FISHEYE": 4,
    "RADIAL_FISHEYE": 5,
    "THIN_PRISM_FISHEYE": 12,
}
MODELS = tuple(PARAMETERS)
READABLE = MODELS[:5]
NORM_TOLERANCE = 1e-3  # of a rotation quaternion
Entry = TypeVar("Entry")
Distortion = tuple[float, float, float, float, float]


class ColmapCamera(NamedTuple):
    """Intrinsics (3, 3) in pixels, size (height, width), and distortion k1, k2, p1, p2, k3."""

    intrinsics: np.ndarray
    size: tuple[int, int]
    distortion: Distortion


class ColmapImage(NamedTuple):
    """Name of a picture, id of its camera, and its camera-to-world pose (4, 4)."""

    name: str
    camera_id: int
    pose: np.ndarray


@dataclass(frozen=True)
class ColmapModel:
    """Cameras by id, images in the order of the file, points (N, 3) and their colors (N, 3) from 0 to 1."""

    cameras: dict[int, ColmapCamera]
    images: list[ColmapImage]
    points: np.ndarray
    colors: np.ndarray


def is_colmap_model(folder: Path) -> bool:
    """True if a folder contains cameras and images of a model."""
    return any(all((folder / f"{name}{end}").is_file() for name in ("cameras", "images")) for end in (".bin", ".txt"))


def read_colmap_model(folder: Path) -> ColmapModel:
    """Reads a model; binary files have precedence. ``points3D`` is optional.

    Raises:
        FileNotFoundError: no cameras and images.
        ValueError: a file that is truncated or of another format, an unsupported camera model, an image without a
            camera, or a quaternion that is not a rotation.
    """
    if not is_colmap_model(folder):
        raise FileNotFoundError(f"{folder} has no cameras.bin and images.bin, or cameras.txt and images.txt.")
    binary = (folder / "cameras.bin").is_file() and (folder / "images.bin").is_file()
    paths = [folder / f"{name}.{'bin' if binary else 'txt'}" for name in ("cameras", "images", "points3D")]
    cameras = dict(_read(paths[0], _cameras_binary if binary else _cameras_text))
    images = _read(paths[1], _images_binary if binary else _images_text)
    points = _read(paths[2], _points_binary if binary else _points_text) if paths[2].is_file() else []
    for image in images:
        if image.camera_id not in cameras:
            raise ValueError(
                f"camera_id={image.camera_id} of {image.name} in {paths[1]} is not in {paths[0]}, which has "
                f"{sorted(cameras)}: export both files from one model."
            )
    table = np.array(points, np.float64).reshape(-1, 6)
    return ColmapModel(cameras, images, table[:, :3], table[:, 3:] / 255)


def _read(path: Path, reader: Callable[[Path], Iterator[Entry]]) -> list[Entry]:
    """Reads all entries of a file; raises a ValueError that names it."""
    try:
        return list(reader(path))
    except UnsupportedCameraError:
        raise
    except (struct.error, ValueError, IndexError) as error:
        raise ValueError(
            f"{path} is truncated or is no {path.suffix} file of a COLMAP model ({error}): export the model again with "
            "`colmap model_converter`."
        ) from error


class UnsupportedCameraError(ValueError):
    """Camera model that is not pinhole with Brown distortion."""


def _camera(path: Path, number: int, model: str, width: int, height: int, values: list[float]) -> ColmapCamera:
    if model not in READABLE:
        raise UnsupportedCameraError(
            f"model={model} of camera {number} in {path} is not supported, only {', '.join(READABLE)}: undistort the "
            "pictures with `colmap image_undistorter`."
        )
    if len(values) != PARAMETERS[model]:
        raise ValueError(f"camera {number} has {len(values)} parameters, {model} has {PARAMETERS[model]}")
    shared = model in ("SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL")  # one focal length
    fx, fy, cx, cy, *rest = [values[0], *values] if shared else values
    k1, k2, p1, p2 = [*rest, 0.0, 0.0, 0.0, 0.0][:4]
    intrinsics = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    return ColmapCamera(intrinsics, (int(height), int(width)), (k1, k2, p1, p2, 0.0))


def _image(name: str, camera_id: int, quaternion: list[float], shift: list[float]) -> ColmapImage:
    norm = float(np.linalg.norm(quaternion))
    if not abs(norm - 1) <= NORM_TOLERANCE:
        raise ValueError(f"quaternion {quaternion} of {name} has norm {norm:.3g}, a rotation has norm 1")
    w, x, y, z = np.array(quaternion) / norm
    turn = np.array(  # world to camera
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = turn.T, -turn.T @ np.array(shift)
    return ColmapImage(name, camera_id, pose)


# ---- binary ----------------------------------------------------------------------------------------------------------


class _Reader:
    """Little-endian values of a file, in order. Raises a struct.error at its end."""

    def __init__(self, path: Path):
        self._data, self._position = path.read_bytes(), 0

    def values(self, layout: str) -> tuple:
        values = struct.unpack_from(f"<{layout}", self._data, self._position)
        self._position += struct.calcsize(f"<{layout}")
        return values

    def count(self) -> int:
        [count] = self.values("Q")
        if count > len(self._data):  # every entry has at least a byte
            raise ValueError(f"{count} entries in {len(self._data)} bytes")
        return count

    def skip(self, size: int) -> None:
        self._position += size
        if self._position > len(self._data):
            raise ValueError(f"{len(self._data)} bytes end in the middle of an entry")

    def text(self) -> str:
        end = self._data.index(b"\0", self._position)
        found = self._data[self._position : end].decode()
        self._position = end + 1
        return found

    def check_end(self) -> None:
        if self._position != len(self._data):
            raise ValueError(f"{len(self._data) - self._position} bytes after the last entry")


def _cameras_binary(path: Path) -> Iterator[tuple[int, ColmapCamera]]:
    reader = _Reader(path)
    for _ in range(reader.count()):
        number, model, width, height = reader.values("iiQQ")
        if not 0 <= model < len(MODELS):
            raise ValueError(f"camera model id {model}")
        values = list(reader.values(f"{PARAMETERS[MODELS[model]]}d"))
        yield number, _camera(path, number, MODELS[model], width, height, values)
    reader.check_end()


def _images_binary(path: Path) -> Iterator[ColmapImage]:
    reader = _Reader(path)
    for _ in range(reader.count()):
        _, *pose, camera_id = reader.values("i7di")
        yield _image(reader.text(), camera_id, pose[:4], pose[4:])
        reader.skip(24 * reader.count())  # x, y and id of observed points
    reader.check_end()


def _points_binary(path: Path) -> Iterator[list[float]]:
    reader = _Reader(path)
    for _ in range(reader.count()):
        _, *values = reader.values("Q3d3Bd")
        yield values[:6]
        reader.skip(8 * reader.count())  # track
    reader.check_end()


# ---- text ------------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> list[str]:
    """Lines without comments. Empty lines are kept: images.txt has one where an image observes no point."""
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def _cameras_text(path: Path) -> Iterator[tuple[int, ColmapCamera]]:
    for line in filter(None, _lines(path)):
        number, model, width, height, *values = line.split()
        yield int(number), _camera(path, int(number), model, int(width), int(height), [float(v) for v in values])


def _images_text(path: Path) -> Iterator[ColmapImage]:
    lines = _lines(path)
    for line, observed in zip_longest(lines[::2], lines[1::2], fillvalue=""):
        if len(observed.split()) % 3:
            raise ValueError(
                f"{observed[:40]!r} must be the points that {line.split()[-1:]} observes, or an empty line"
            )
        if line:
            _, *pose, camera_id, name = line.split(maxsplit=9)
            values = [float(value) for value in pose]
            yield _image(name, int(camera_id), values[:4], values[4:])


def _points_text(path: Path) -> Iterator[list[float]]:
    for line in filter(None, _lines(path)):
        yield [float(value) for value in line.split()[1:7]]
