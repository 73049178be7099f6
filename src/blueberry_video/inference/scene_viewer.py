"""Self-contained HTML file that plays a scene offline in a browser with WebGL2: orbit, zoom, pan, and time.

The file ``scene_viewer.html`` of this folder is the page; its renderer has the formulas of
:mod:`blueberry_video.ops.rasterizer`. The scene is embedded as JSON header and base64 of zlib-compressed little-endian
arrays, of which ``arrays`` of the header gives type, shape and offset in bytes:

    means (N, 3), log_scales (N, 3), quats (N, 4), opacities (N)    float32
    harmonics (N, K, 3)                                             float16

With ``dynamics`` "native" also velocities (N, 3), time_means (N), log_durations (N) float32 and is_static (N) uint8,
which the page evaluates exactly. With "keys" an array <name>_offsets float16 (T, N, …) for each array that depends on
time, which the page adds to it: it is the difference at ``key_times``, between which the page interpolates linearly.

Shapes: N Gaussians, T key times, K spherical harmonics.
"""

import base64
import html
import json
import math
import re
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blueberry_video.atomic import write_text
from blueberry_video.inference.camera_paths import orbit_of
from blueberry_video.inference.render import TrainedScene
from blueberry_video.models.gaussian_splatting import (
    Deformation,
    Gaussians,
    GaussianSplatting4D,
    HexPlane,
    Native,
    Static,
)
from blueberry_video.models.gaussian_splatting.dynamics import Dynamics

TEMPLATE = Path(__file__).with_suffix(".html")
MIN_SCALE = 1e-20
MIN_ALPHA = 1 / 255  # Gaussians that never reach this opacity are left out
KEY_TIMES = 24
DIMENSIONS = {"means": 2, "log_scales": 2, "quats": 2, "opacities": 1, "harmonics": 3}  # without time


def write_viewer(
    scene: TrainedScene,
    path: str | Path,
    key_times: int = KEY_TIMES,
    frames: int = 120,
    fps: float = 24.0,
    title: str = "Scene",
) -> int:
    """Writes the HTML file; returns its size in bytes.

    Args:
        key_times: least T, for dynamics that are not native, see :func:`times_to_store`.
        frames, fps: a pass through the scene takes ``frames / fps`` seconds.
        title: title of the page.

    Raises:
        ValueError: for values out of range, or Gaussians that are not finite.
    """
    if key_times < 2:
        raise ValueError(f"key_times={key_times} must be at least 2, the first and the last time.")
    if frames < 1 or not 0 < fps < math.inf:
        raise ValueError(f"frames={frames} must be at least 1 and fps={fps} above 0.")
    header, arrays = pack(scene.model, key_times)
    data = bytearray()
    header["arrays"] = {}
    for name, value in arrays.items():
        data += bytes(-len(data) % 4)  # of the alignment of float32
        kind = {"<f4": "float32", "<f2": "float16", "|u1": "uint8"}[value.dtype.str]
        header["arrays"][name] = {"dtype": kind, "shape": list(value.shape), "offset": len(data)}
        data += value.tobytes()
    orbit = orbit_of(scene.poses)
    height, width = scene.image_size
    header["orbit"] = {
        "target": orbit.target.tolist(),
        "axes": orbit.axes.T.tolist(),
        "distance": orbit.distance,
        "elevation": max(-1.5, min(1.5, orbit.elevation)),
        "focal": float(scene.intrinsics[1, 1]) / height,
        "aspect": width / height,
    }
    header |= {"background": scene.background.tolist(), "frames": frames, "seconds": frames / fps}
    filled = {
        "__TITLE__": html.escape(title),
        "__HEADER__": json.dumps(header, allow_nan=False).replace("<", "\\u003c"),
        "__DATA__": base64.b64encode(zlib.compress(bytes(data))).decode("ascii"),
    }
    # in one pass: a title may contain another key
    page = re.sub("|".join(filled), lambda key: filled[key[0]], TEMPLATE.read_text(encoding="utf-8"))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return len(page.encode())


@torch.no_grad()
def pack(model: GaussianSplatting4D, key_times: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the header and the arrays of the Gaussians of a model; see the module.

    Raises:
        ValueError: for values that are not finite.
    """
    dynamics, arrays = model.dynamics, {}
    if isinstance(dynamics, Native):
        kind, times = "native", []
        arrays = _stored(model.gaussians())
        arrays["velocities"], arrays["time_means"] = dynamics.velocities, dynamics.time_means
        arrays["log_durations"], arrays["is_static"] = dynamics.log_durations, dynamics.is_static
        peak = arrays["opacities"]
    else:
        kind, times = "keys", times_to_store(dynamics, key_times)
        keys = [_stored(model(torch.tensor([time]))) for time in times]
        for name, first in keys[0].items():
            if first.ndim == DIMENSIONS[name]:  # does not depend on time
                arrays[name] = first
                continue
            values = torch.cat([key[name] for key in keys])
            arrays[name] = (values.amin(0) + values.amax(0)) / 2  # offsets are small, half floats precise
            arrays[f"{name}_offsets"] = values - (arrays[name].half() if name == "harmonics" else arrays[name])
        peak = torch.stack([key["opacities"] for key in keys]).flatten(0, -2).amax(0)
    _check_finite(arrays)
    drawn = peak >= MIN_ALPHA
    found = {name: _array(name, value, drawn) for name, value in arrays.items()}
    return {
        "format": 1,
        "dynamics": kind,
        "count": int(drawn.sum()),
        "sh_degree": math.isqrt(arrays["harmonics"].shape[1]) - 1,
        "key_times": times,
        "moves": kind == "native" or len(times) > 1,
    }, found


def times_to_store(dynamics: Dynamics, least: int) -> list[float]:
    """Key times, ascending from 0 to 1; a single one for a static scene.

    The features of a HexPlane are linear between the cells of its time axis: these are key times, subdivided evenly
    until there are at least ``least``.
    """
    if isinstance(dynamics, Static):
        return [0.0]
    knots = [0.0, 1.0]
    if isinstance(dynamics, Deformation) and isinstance(dynamics.field, HexPlane):
        planes: Any = dynamics.field.planes[0]
        cells = planes["xt"].shape[-2]
        first = 0 if dynamics.field.full_time_range else -1
        found = [first + (1 - first) * index / (cells - 1) for index in range(cells)]
        knots = [0.0, *(time for time in found if 0 < time < 1), 1.0]
    parts = math.ceil((least - 1) / (len(knots) - 1))
    steps = [(low + (high - low) * part / parts) for low, high in pairwise(knots) for part in range(parts)]
    return [*steps, 1.0]


def _stored(gaussians: Gaussians) -> dict[str, Tensor]:
    means, scales, quats, opacities, harmonics = (value.detach().cpu().float() for value in gaussians)
    log_scales = scales.clamp(min=MIN_SCALE).log()
    quats = torch.nn.functional.normalize(quats, dim=-1)
    return dict(zip(DIMENSIONS, (means, log_scales, quats, opacities, harmonics), strict=True))


def _array(name: str, value: Tensor, drawn: Tensor) -> np.ndarray:
    offsets = name.endswith("_offsets")
    value = value.detach().cpu()
    value = value[:, drawn] if offsets else value[drawn]
    if value.dtype == torch.bool:
        return value.numpy().astype("|u1")
    return value.contiguous().numpy().astype("<f2" if offsets or name == "harmonics" else "<f4")


def _check_finite(arrays: dict[str, Tensor]) -> None:
    for name, value in arrays.items():
        limit = np.finfo(np.float16).max if name == "harmonics" or name.endswith("_offsets") else np.inf
        if not (value.float().abs() < limit).all():
            raise ValueError(
                f"{name} of the Gaussians has NaN, infinite values or values above {limit:g}: train the scene again, "
                "with lower learning rates."
            )
