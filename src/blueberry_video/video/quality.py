"""Quality statistics of processed videos, for reports only: temporal coverage, frame content, time and memory."""

import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.video.pool import Outcome

if TYPE_CHECKING:
    import wandb

LUMA_SIZE = 32  # frames are compared as 32 x 32 luma values
DUPLICATE_LEVELS = 0.5  # of 255; compression noise of a still image, averaged over a cell, is less
BLACK_LEVEL, BLACK_AREA = 25.5, 0.98  # as in ffmpeg's blackdetect: 98 % of the pixels below a tenth of full luma


def coverage(timestamps: Iterable[float], first: float, last: float) -> dict[str, float]:
    """Temporal coverage of a video by the selected frames.

    Args:
        timestamps: seconds of the selected frames, in any order; values outside [first, last] extend the interval.
        first, last: seconds of the first and last candidate frame.

    Returns:
        ``coverage``: share of the interval between the first and the last selected frame, 1 for a still image.
        ``largest_gap``: seconds of the longest interval without a selected frame, including both ends of the video.

    Raises:
        ValueError: ``timestamps`` is empty, or ``last`` is less than ``first``.
    """
    chosen = sorted(map(float, timestamps))
    if not chosen or last < first:
        raise ValueError(f"{len(chosen)} timestamps, first={first}, last={last}: pass at least one, and last >= first.")
    first, last = min(first, chosen[0]), max(last, chosen[-1])
    edges = [first, *chosen, last]
    return {
        "coverage": (chosen[-1] - chosen[0]) / (last - first) if last > first else 1.0,
        "largest_gap": max(b - a for a, b in pairwise(edges)),
    }


def frame_quality(frames: Tensor) -> dict[str, float]:
    """Content statistics of uint8 (T, 3, H, W) frames, from downscaled luma.

    Returns:
        ``duplicate_share``: share of the T - 1 pairs of adjacent frames with a mean absolute difference below half a
        level of 255; 0 for a single frame. ``black_share``: share of the frames in which 98 % of the pixels are darker
        than a tenth of full luma. ``contrast``: standard deviation of luma within a frame, averaged over the frames,
        0 to 127.5 levels.
    """
    luma = _luma(frames)
    same = luma.diff(dim=0).abs().mean(dim=(1, 2)) < DUPLICATE_LEVELS  # (T - 1,)
    black = (luma < BLACK_LEVEL).flatten(1).float().mean(dim=1) >= BLACK_AREA
    return {
        "duplicate_share": float(same.float().mean()) if len(same) else 0.0,
        "black_share": float(black.float().mean()),
        "contrast": float(luma.flatten(1).std(dim=1, correction=0).mean()),
    }


class Stopwatch:
    """Wall time per stage in seconds: ``with watch.stage("decode"): …``. Times of a repeated stage are summed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures the time of the block, also if it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def peak_memory() -> int:
    """Returns the peak resident set size of this process in bytes.

    It includes Python and PyTorch (about 300 MB), excludes GPU memory and never decreases.
    """
    status = Path("/proc/self/status")
    # preferred on Linux, where getrusage starts at the peak of the parent program
    if status.exists() and (peak := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(peak[1]) * 1024
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024


def error_rates(outcomes: Iterable[object]) -> dict[str, float]:
    """Returns the share of each exception type, most frequent first, among all outcomes: ``Outcome`` of
    ``process_videos``, or results and exceptions."""
    found = [outcome.error if isinstance(outcome, Outcome) else outcome for outcome in outcomes]
    counts = Counter(type(error).__name__ for error in found if isinstance(error, BaseException))
    return {name: count / len(found) for name, count in counts.most_common()}


def wandb_table(rows: Iterable[Mapping[str, Any]]) -> "wandb.Table":
    """Returns a wandb table with one row per video and a column for every key, in order of appearance. Requires no run.

    Nested mappings become columns ``key/inner``. Missing keys are None, and values that are neither numbers nor strings
    become strings.
    """
    import wandb  # imported here, because it takes a second

    columns, flat = _table(rows)
    return wandb.Table(columns=[*columns], data=[[row.get(key) for key in columns] for row in flat])


def log_to_mlflow(rows: Iterable[Mapping[str, Any]], table: str = "videos.json", step: int | None = None) -> None:
    """Logs videos to the active MLflow run: a table with the rows and columns of :func:`wandb_table`, and the mean of
    each numeric column as the metric ``video/<column>``.

    Args:
        rows: ``video.summary()`` of each video.
        table: artifact file of the table, ``.json`` or ``.parquet``.
        step: step of the metrics.

    Raises:
        ModuleNotFoundError: MLflow is not installed, the extra ``mlflow``.
    """
    import mlflow  # optional, and takes a second

    columns, flat = _table(rows)
    mlflow.log_table({key: [row.get(key) for row in flat] for key in columns}, table)
    for key in columns:
        numbers = [float(row[key]) for row in flat if isinstance(row.get(key), int | float)]
        if numbers and len(numbers) == sum(row.get(key) is not None for row in flat):
            mlflow.log_metric(f"video/{key}", sum(numbers) / len(numbers), step=step)


def _table(rows: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns in order of appearance, and flat rows."""
    flat = [dict(_flattened(row)) for row in rows]
    return list(dict.fromkeys(key for row in flat for key in row)), flat


def _flattened(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}/")
        else:
            plain = value is None or isinstance(value, bool | int | float | str)
            yield f"{prefix}{key}", value if plain else str(value)


def _luma(frames: Tensor) -> Tensor:
    """Downscales uint8 (T, 3, H, W) to luma float32 (T, h, w) in 0..255, at most 32 x 32, from a pixel subsample."""
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames is {frames.dtype} {tuple(frames.shape)} and must be a non-empty uint8 (T, 3, H, W).")
    height, width = frames.shape[2:]
    # four pixels per cell and direction suffice, so that a 720p frame costs as little as a thumbnail
    every = [max(side // (4 * LUMA_SIZE), 1) for side in (height, width)]
    cells = (min(height, LUMA_SIZE), min(width, LUMA_SIZE))
    parts = []
    for part in frames[:, :, :: every[0], :: every[1]].split(32):  # bounds the memory of the float copy
        red, green, blue = part.float().unbind(1)
        parts.append(F.adaptive_avg_pool2d(0.299 * red + 0.587 * green + 0.114 * blue, cells))  # BT.601, as in JPEG
    return torch.cat(parts)
