"""Files of Gaussians in the layout of 3D Gaussian Splatting (.ply), which viewers read; one file for each time.

The file is a binary little-endian PLY with one vertex per Gaussian and float32 properties: position ``x, y, z``, unused
normals ``nx, ny, nz``, harmonics ``f_dc_*`` and ``f_rest_*`` (all coefficients of red first), logit ``opacity``,
logarithms ``scale_*``, and quaternion ``rot_*`` (w, x, y, z).
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from blueberry_video.atomic import atomic_file
from blueberry_video.models.gaussian_splatting.gaussians import MAX_DEGREE, Gaussians
from blueberry_video.models.gaussian_splatting.model import GaussianSplatting4D
from blueberry_video.ops.rasterizer.inputs import MIN_ALPHA

POSITION, NORMAL, CONSTANT = ["x", "y", "z"], ["nx", "ny", "nz"], [f"f_dc_{i}" for i in range(3)]
SCALE, ROTATION = [f"scale_{i}" for i in range(3)], [f"rot_{i}" for i in range(4)]
OPACITY_MARGIN = 1e-6  # opacities are stored as logits, at least this far from 0 and 1
MIN_SCALE = 1e-20
HEADER_BYTES = 2**16  # a longer header is of another format
TYPES = {
    **dict.fromkeys(("char", "int8"), "<i1"),
    **dict.fromkeys(("uchar", "uint8"), "<u1"),
    **dict.fromkeys(("short", "int16"), "<i2"),
    **dict.fromkeys(("ushort", "uint16"), "<u2"),
    **dict.fromkeys(("int", "int32"), "<i4"),
    **dict.fromkeys(("uint", "uint32"), "<u4"),
    **dict.fromkeys(("float", "float32"), "<f4"),
    **dict.fromkeys(("double", "float64"), "<f8"),
}


@torch.no_grad()
def write_ply(gaussians: Gaussians, path: str | Path) -> None:
    """Writes Gaussians at one time.

    Raises:
        ValueError: for Gaussians at several times, or values that are not finite.
    """
    means, scales, quats, opacities, harmonics = (value.detach().cpu().float() for value in gaussians)
    if means.ndim != 2 or opacities.ndim != 1:
        raise ValueError(
            f"means has shape {tuple(means.shape)} and opacities {tuple(opacities.shape)}: a file has one time: call "
            "the model with one time, or use write_sequence()."
        )
    columns = [
        means,
        torch.zeros_like(means),
        harmonics[:, 0],
        harmonics[:, 1:].mT.flatten(1),
        opacities.logit(OPACITY_MARGIN)[:, None],
        scales.clamp(min=MIN_SCALE).log(),
        F.normalize(quats, dim=-1),
    ]
    table = torch.cat(columns, 1)
    if not table.isfinite().all():
        bad = int((~table.isfinite()).any(1).sum())
        raise ValueError(
            f"{bad} of the {len(table)} Gaussians have NaN or infinite values: remove them before writing."
        )
    rest = [f"f_rest_{i}" for i in range(columns[3].shape[1])]
    names = [*POSITION, *NORMAL, *CONSTANT, *rest, "opacity", *SCALE, *ROTATION]
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(table)}"]
    header = "\n".join([*lines, *(f"property float {name}" for name in names), "end_header", ""])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = header.encode("ascii") + table.numpy().astype("<f4").tobytes()
    with atomic_file(path, needed=len(data)) as file:
        file.write(data)


def write_sequence(
    model: GaussianSplatting4D, folder: str | Path, times: Sequence[float], keep_existing: bool = False
) -> list[Path]:
    """Writes ``frame_0000.ply``, ``frame_0001.ply``, … with the Gaussians at each time.

    Gaussians with an opacity below 1/255, which are never drawn, are left out. With ``keep_existing``, files that exist
    are kept, to continue after a kill: a file appears when it is complete.

    Raises:
        ValueError: for no times, a time outside [0, 1], or values that are not finite.
    """
    if not len(times):
        raise ValueError("times=[] must have at least one time in [0, 1].")
    digits = max(4, len(str(len(times) - 1)))
    paths = [Path(folder) / f"frame_{number:0{digits}d}.ply" for number in range(len(times))]
    for path, time in zip(paths, times, strict=True):
        if keep_existing and path.is_file():
            continue
        with torch.no_grad():
            gaussians = model(time)
            drawn = ~(gaussians.opacities < MIN_ALPHA)  # keeps NaN, which raises
            write_ply(Gaussians(*(value[drawn] for value in gaussians)), path)
    return paths


def read_ply(path: str | Path) -> Gaussians:
    """Reads Gaussians; additional properties are ignored.

    Raises:
        FileNotFoundError: no such file.
        ValueError: for a file of another format, missing properties, or values that are not finite.
    """
    path = Path(path)
    vertices = _read_vertices(path)
    names = vertices.dtype.names or ()
    rest = sorted((name for name in names if re.fullmatch(r"f_rest_\d+", name)), key=lambda name: int(name[7:]))
    required = [*POSITION, *CONSTANT, "opacity", *SCALE, *ROTATION]
    missing = [name for name in required if name not in names]
    if missing:
        raise ValueError(
            f"{path} has no property {', '.join(missing)} (it has {', '.join(names[:8])}, …): it is no file "
            "of Gaussians in the layout of 3D Gaussian Splatting; export it uncompressed."
        )
    counts = [3 * ((degree + 1) ** 2 - 1) for degree in range(MAX_DEGREE + 1)]
    if len(rest) not in counts or rest != [f"f_rest_{i}" for i in range(len(rest))]:
        raise ValueError(
            f"{path} has {len(rest)} properties f_rest_*: it must have f_rest_0 to f_rest_{{n - 1}} with n = "
            f"{', '.join(map(str, counts))}, for harmonics of degree 0 to {MAX_DEGREE}."
        )

    def columns(chosen: list[str]) -> torch.Tensor:
        return torch.from_numpy(np.stack([vertices[name].astype(np.float32) for name in chosen], 1))

    table = columns([*required, *rest])
    if not table.isfinite().all():
        bad = int((~table.isfinite()).any(1).sum())
        raise ValueError(f"{path} has {bad} Gaussians with NaN or infinite values, of {len(table)}: export it again.")
    constant = columns(CONSTANT)[:, None]
    harmonics = constant
    if rest:
        harmonics = torch.cat([constant, columns(rest).unflatten(1, (3, -1)).mT], 1).contiguous()
    opacities = columns(["opacity"])[:, 0].sigmoid()
    return Gaussians(columns(POSITION), columns(SCALE).exp(), columns(ROTATION), opacities, harmonics)


def _read_vertices(path: Path) -> np.ndarray:
    """Vertices of a PLY file as a structured array."""
    data = path.read_bytes()
    end = data.find(b"end_header\n", 0, HEADER_BYTES)
    windows_end = data.find(b"end_header\r\n", 0, HEADER_BYTES)
    start = end + len(b"end_header\n") if end >= 0 else windows_end + len(b"end_header\r\n")
    if not data.startswith((b"ply\n", b"ply\r\n")) or max(end, windows_end) < 0:
        raise ValueError(f"{path} begins with {data[:8]!r}: it is no PLY file, which begins with 'ply' and a header.")
    words = [line.split() for line in data[:start].decode("ascii", errors="replace").splitlines()]
    kind = next((line[1] for line in words if line[:1] == ["format"] and len(line) > 1), None)
    if kind != "binary_little_endian":
        raise ValueError(f"format={kind} of {path} must be binary_little_endian: export it as a binary file.")
    elements = [position for position, line in enumerate(words) if line[:1] == ["element"]]
    first = words[elements[0]] if elements else []
    if len(first) != 3 or first[1] != "vertex" or not first[2].isdecimal():
        raise ValueError(
            f"{path} begins with {' '.join(first)!r}, not with vertices: export it as uncompressed Gaussians."
        )
    last = elements[1] if len(elements) > 1 else len(words)
    properties = [line for line in words[elements[0] + 1 : last] if line[:1] == ["property"]]
    unknown = [" ".join(line) for line in properties if len(line) != 3 or line[1] not in TYPES]
    if unknown:
        raise ValueError(f"{path} has {unknown[0]!r}: properties must be numbers; it is no file of Gaussians.")
    layout = np.dtype([(name, TYPES[kind]) for _, kind, name in properties])
    count = int(first[2])
    if len(data) - start < count * layout.itemsize:
        raise ValueError(
            f"{path} has {len(data) - start} bytes after the header, {count} vertices require "
            f"{count * layout.itemsize}: it is truncated, copy it again."
        )
    return np.frombuffer(data, layout, count, start)
