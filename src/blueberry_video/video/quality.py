"""Numbers about what the pipeline did: how well the frames cover the video, what they show, what it took.

Nothing here decides anything: the numbers go into the result, and into a wandb table.
"""

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

if TYPE_CHECKING:
    import wandb

LUMA_SIZE = 32  # frames are compared as pictures of 32 x 32 luma values
DUPLICATE_LEVELS = 0.5  # of 255: what compression does to a still picture is less, once averaged over a cell
BLACK_LEVEL, BLACK_AREA = 25.5, 0.98  # ffmpeg's blackdetect: 98 % of the picture below a tenth of full luma


def coverage(timestamps: Iterable[float], first: float, last: float) -> dict[str, float]:
    """How much of a video's time the chosen frames span.

    Args:
        timestamps: seconds of the chosen frames, in any order; what lies outside of [first, last] widens it.
        first, last: seconds of the first and last frame that could have been chosen.

    Returns:
        ``coverage``: share of the time between the first and the last chosen frame, 1 for a still. ``largest_gap``:
        seconds of the longest stretch without a chosen frame, the two ends of the video included.

    Raises:
        ValueError: no timestamps, or ``last`` before ``first``.
    """
    chosen = sorted(map(float, timestamps))
    if not chosen or last < first:
        raise ValueError(
            f"{len(chosen)} timestamps in [{first}, {last}]: give at least one, and last no less than first."
        )
    first, last = min(first, chosen[0]), max(last, chosen[-1])
    edges = [first, *chosen, last]
    return {
        "coverage": (chosen[-1] - chosen[0]) / (last - first) if last > first else 1.0,
        "largest_gap": max(b - a for a, b in pairwise(edges)),
    }


def frame_quality(frames: Tensor) -> dict[str, float]:
    """What frames uint8 (T, 3, H, W) show, at the price of one look at a sample of their pixels.

    Returns:
        ``duplicate_share`` and ``black_share`` as the functions of these names, and ``contrast``: the standard
        deviation of luma within a frame, mean over the frames, 0 to 127.5 levels.
    """
    small = _luma(frames)
    contrast = small.flatten(1).std(dim=1, correction=0).mean()
    return {"duplicate_share": _duplicates(small), "black_share": _blacks(small), "contrast": float(contrast)}


def duplicate_share(frames: Tensor) -> float:
    """Share of the T - 1 pairs of neighbours that look the same; 0 for a single frame.

    They do where their downscaled luma differs by less than half a level of 255 on average.
    """
    return _duplicates(_luma(frames))


def black_share(frames: Tensor) -> float:
    """Share of the frames of which 98 % is darker than a tenth of full luma, on downscaled frames."""
    return _blacks(_luma(frames))


class Stopwatch:
    """Seconds of wall time a stage: ``with watch.stage("decode"): …``; the times of a repeated stage add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts what happens inside, also where it ends in an exception."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def peak_memory() -> int:
    """Bytes of the largest resident set that this process has had since it started.

    It holds Python and PyTorch themselves (some 300 MB) and never falls: what one video took shows only where it is the
    highest so far. GPU memory is not in it.
    """
    status = Path("/proc/self/status")
    # first choice on Linux, where getrusage begins with the peak of the program that started this one
    if status.exists() and (peak := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(peak[1]) * 1024
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024


def error_rates(outcomes: Iterable[object]) -> dict[str, float]:
    """Share of each type of error among all outcomes (results and exceptions), by the type's name, commonest first."""
    outcomes = list(outcomes)
    counts = Counter(type(outcome).__name__ for outcome in outcomes if isinstance(outcome, BaseException))
    return {name: count / len(outcomes) for name, count in counts.most_common()}


def wandb_table(rows: Iterable[Mapping[str, Any]]) -> "wandb.Table":
    """A table with one row a video: a column for every key that any row has, in order of appearance.

    Mappings within a row become columns ``key/inner``; what a row lacks is empty; what is neither a number nor a
    string is written out. Needs no run.
    """
    import wandb  # takes a second, and only who wants the table pays it

    flat = [dict(_flattened(row)) for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    return wandb.Table(columns=[*columns], data=[[row.get(key) for key in columns] for row in flat])


def _flattened(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}/")
        else:
            plain = value is None or isinstance(value, bool | int | float | str)
            yield f"{prefix}{key}", value if plain else str(value)


def _luma(frames: Tensor) -> Tensor:
    """uint8 (T, 3, H, W) -> float32 (T, h, w) in 0..255, at most 32 x 32: means over a grid of every n-th pixel."""
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames is {frames.dtype} {tuple(frames.shape)}, but must be uint8 (T, 3, H, W).")
    height, width = frames.shape[2:]
    # four pixels a cell and direction are plenty: a 720p frame costs as little as a thumbnail
    every = [max(side // (4 * LUMA_SIZE), 1) for side in (height, width)]
    cells = (min(height, LUMA_SIZE), min(width, LUMA_SIZE))
    small = []
    for part in frames[:, :, :: every[0], :: every[1]].split(32):  # floats of a few frames at a time
        red, green, blue = part.float().unbind(1)
        small.append(F.adaptive_avg_pool2d(0.299 * red + 0.587 * green + 0.114 * blue, cells))  # BT.601, as in JPEG
    return torch.cat(small)


def _duplicates(small: Tensor) -> float:
    if len(small) < 2:
        return 0.0
    return float((small.diff(dim=0).abs().mean(dim=(1, 2)) < DUPLICATE_LEVELS).float().mean())


def _blacks(small: Tensor) -> float:
    dark = (small < BLACK_LEVEL).flatten(1).float().mean(dim=1)
    return float((dark >= BLACK_AREA).float().mean())
