"""Files of depth or disparity maps: 16-bit PNG, EXR and NPZ, with a sidecar ``depth.json`` that defines their values.

    {"kind": "depth"|"disparity", "unit": "m"|"cm"|"mm"|null, "scale": 1.0, "offset": 0.0, "invalid": 0 | "nan" | null}

A value is ``offset + scale * stored``; ``unit`` then converts depth to meters, and is null for disparity. ``scale``
defaults to 1, ``offset`` to 0, ``invalid`` to null. Further keys are ignored, but these in another spelling raise.
Stored values equal to ``invalid`` and all values that are not finite are invalid, and so is depth of at most 0. An EXR
file has the map in channel Z, else Y, else R; an NPZ file in the array ``depth`` or ``disparity``, (H, W) or (T, H, W).
"""

import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blueberry_video.installation import install_command
from blueberry_video.video.errors import BrokenVideoError, one_line

SIDECAR = "depth.json"
EXTENSIONS = (".png", ".exr", ".npz")
KINDS = ("depth", "disparity")
METERS = {"m": 1.0, "cm": 0.01, "mm": 0.001}
EXAMPLE = '{"kind": "depth", "unit": "mm", "scale": 1.0, "offset": 0.0, "invalid": 0}'


@dataclass(frozen=True)
class DepthFormat:
    """Meaning of the stored values of a folder of maps; the fields are the keys of ``depth.json``.

    Args:
        kind: ``depth``, or ``disparity`` of unknown scale and shift, larger for nearer pixels.
        unit: of depth: ``m``, ``cm`` or ``mm``; ``None`` for disparity.
        scale, offset: a value is ``offset + scale * stored``.
        invalid: stored value of invalid pixels; ``"nan"`` or ``None``: only values that are not finite.

    Raises:
        ValueError: a value of a wrong type or out of range.
    """

    kind: str
    unit: str | None = None
    scale: float = 1.0
    offset: float = 0.0
    invalid: float | str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} must be 'depth' or 'disparity'.")
        if self.kind == "depth" and self.unit not in METERS:
            raise ValueError(f"unit={self.unit!r} of kind='depth' must be one of {', '.join(map(repr, METERS))}.")
        if self.kind == "disparity" and self.unit is not None:
            raise ValueError(f"unit={self.unit!r} of kind='disparity' must be null: disparity has no unit.")
        for key, value in (("scale", self.scale), ("offset", self.offset)):
            if not _is_number(value) or not np.isfinite(value) or (key == "scale" and value == 0):
                raise ValueError(f"{key}={value!r} must be a finite number{', not 0' if key == 'scale' else ''}.")
        if self.invalid not in (None, "nan") and not _is_number(self.invalid):
            raise ValueError(f"invalid={self.invalid!r} must be a number, 'nan' or null.")

    def values(self, stored: np.ndarray) -> Tensor:
        """Returns float32 maps of the shape of ``stored``: depth in meters, 0 where it is invalid, or disparity, NaN
        where it is invalid."""
        numbers = stored.astype(np.float64)
        valid = np.isfinite(numbers)
        if _is_number(self.invalid):
            valid &= numbers != float(np.asarray(self.invalid, stored.dtype if stored.dtype.kind == "f" else None))
        numbers = self.offset + self.scale * np.where(valid, numbers, 0)
        if self.kind == "disparity":
            return torch.from_numpy(np.where(valid, numbers, np.nan).astype(np.float32))
        depth = (METERS[str(self.unit)] * numbers).astype(np.float32)
        return torch.from_numpy(np.where(valid & (depth > 0) & np.isfinite(depth), depth, np.float32(0)))

    def is_valid(self, maps: Tensor) -> Tensor:
        """Returns the mask of the valid pixels of maps that :meth:`values` returned."""
        return maps > 0 if self.kind == "depth" else maps.isfinite()


def read_format(folder: Path) -> DepthFormat:
    """Reads ``depth.json`` of a folder of maps.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not valid; the message names the key and its value.
    """
    path = folder / SIDECAR
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}, which defines the kind, unit and invalid value of the maps: write it, such as "
            f"{EXAMPLE}."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): write it as in {EXAMPLE}.") from error
    if not isinstance(content, dict) or "kind" not in content:
        raise ValueError(f"{path} has no key kind: write it as in {EXAMPLE}.")
    keys = ("kind", "unit", "scale", "offset", "invalid")
    for key in content:
        meant = next((known for known in keys if known == key.strip().lower().removesuffix("s")), key)
        if key not in keys and meant in keys:
            raise ValueError(f"{path} has the key {key!r}, which is not read: rename it to {meant!r}.")
    try:
        return DepthFormat(**{key: content[key] for key in keys if key in content})
    except ValueError as error:
        raise ValueError(f"{path}: {error} Write it as in {EXAMPLE}.") from error


class DepthSequence:
    """Maps of one image or video: a file, or a folder of files in natural order. Reads only the requested maps.

    Args:
        path: ``.png`` or ``.exr`` file with one map, ``.npz`` file with one or several, or a folder of these.
        format: of the values.

    Raises:
        ValueError: an 8-bit PNG, or an NPZ file without the array of the kind.
        BrokenVideoError: a file that cannot be read, or a folder without maps.
        ImportError: (when reading an EXR file) the package OpenEXR is not installed.
    """

    def __init__(self, path: Path, format: DepthFormat):
        self.path, self.format = path, format
        files = sorted((file for file in path.iterdir() if is_map(file)), key=natural) if path.is_dir() else [path]
        if not files:
            raise BrokenVideoError(f"{path} has no maps ({', '.join(EXTENSIONS)}): put one map per frame there.")
        self._maps: list[tuple[Path, int]] = []  # file and index in it
        for file in files:
            count = _npz_count(file, format.kind) if file.suffix.lower() == ".npz" else 1
            self._maps += [(file, index) for index in range(count)]

    def __len__(self) -> int:
        return len(self._maps)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Returns float32 maps (len(indices), H, W); see :meth:`DepthFormat.values`.

        Raises:
            ValueError: maps of different sizes.
        """
        opened: dict[Path, np.ndarray] = {}
        maps = []
        for number in indices:
            file, index = self._maps[number]
            if file not in opened:
                opened[file] = read_stored(file, self.format.kind)
            stored = opened[file]
            maps.append(self.format.values(stored[index] if stored.ndim == 3 else stored))
        sizes = sorted({tuple(each.shape) for each in maps})
        if len(sizes) > 1:
            raise ValueError(
                f"{self.path} has maps of {sizes[0]} and of {sizes[1]} pixels (height, width): make them equal."
            )
        return torch.stack(maps)


def read_stored(path: Path, kind: str = "depth") -> np.ndarray:
    """Reads the stored values of a map: uint16 of a PNG, floats of an EXR, the array ``kind`` of an NPZ file.

    Raises:
        ValueError: a PNG that is not 16-bit grayscale, or an NPZ file without the array.
        BrokenVideoError: a file that cannot be read.
        ImportError: an EXR file without the package OpenEXR.
    """
    readers = {".png": _read_png, ".exr": _read_exr, ".npz": lambda file: _read_npz(file, kind)}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise ValueError(f"{path} is not a map: use one of {', '.join(EXTENSIONS)}.")
    return readers[suffix](path)


def is_map(path: Path) -> bool:
    """Returns whether a path is that of a map file."""
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def natural(path: Path) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key in which frame 10 follows frame 9."""
    parts = re.split(r"(\d+)", path.name.lower())
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts], path.name


def _read_png(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            mode, found = image.mode, np.asarray(image)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenVideoError(f"{path} cannot be read as a PNG file ({one_line(error)}): write it again.") from error
    if not mode.startswith("I"):
        raise ValueError(
            f"{path} has mode={mode}, 8 bits per pixel: save maps as 16-bit grayscale PNG (mode I;16), EXR or NPZ, "
            "because 256 steps are too coarse for depth."
        )
    return found.astype(np.uint16) if found.dtype.itemsize == 2 else found


def _read_exr(path: Path) -> np.ndarray:
    library = _openexr()
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}.")
    try:
        with library.File(str(path), separate_channels=True) as file:
            channels = {name: np.array(channel.pixels) for name, channel in file.channels().items()}
    except Exception as error:  # the binding raises RuntimeError and others, by version
        raise BrokenVideoError(f"{path} cannot be read as an EXR file ({one_line(error)}): write it again.") from error
    for name in ("Z", "Y", "R"):
        if name in channels:
            return channels[name]
    raise ValueError(f"{path} has the channels {', '.join(sorted(channels))}: store the map in Z, Y or R.")


def _openexr() -> ModuleType:
    try:
        import OpenEXR
    except ImportError as error:
        raise ImportError(
            f"OpenEXR cannot be imported ({error}), and EXR files need it: run "
            f"`{install_command('exr')}`, or store the maps as 16-bit PNG or NPZ."
        ) from error
    return OpenEXR


def _read_npz(path: Path, kind: str) -> np.ndarray:
    _npz_shape(path, kind)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[kind]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zipfile.error) as error:
        raise BrokenVideoError(f"{path} cannot be read as an NPZ file ({one_line(error)}): write it again.") from error


def _npz_count(path: Path, kind: str) -> int:
    shape = _npz_shape(path, kind)
    return shape[0] if len(shape) == 3 else 1


def _npz_shape(path: Path, kind: str) -> tuple[int, ...]:
    """Shape of the array ``kind``, from its header."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if kind in names:
                with archive.open(f"{kind}.npy") as file:
                    first = np.lib.format.read_magic(file) == (1, 0)
                    header: Any = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
                    shape = header(file)[0]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BrokenVideoError(f"{path} cannot be read as an NPZ file ({one_line(error)}): write it again.") from error
    if kind not in names:
        raise ValueError(
            f"{path} has the arrays {', '.join(names) or 'none'}, but kind={kind!r} in {SIDECAR}: name the array "
            f"{kind}."
        )
    if len(shape) not in (2, 3):
        raise ValueError(f"{path}: {kind} has shape {shape}: it must be (H, W) or (T, H, W).")
    return shape


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
