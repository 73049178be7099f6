"""Samplers beyond even spacing: bursts of consecutive frames, rounds from coarse to fine, those of other packages.

A package adds a sampler with an entry point of the group ``blueberry.video.samplers``: a function of timestamps, number
of frames and keyframes that returns ascending indices. Its name is then a value of ``sampling``.
"""

import functools
import heapq
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points

import numpy as np

GROUP = "blueberry.video.samplers"
Sampler = Callable[[np.ndarray, int, Sequence[int]], Sequence[int]]


def bursts(first: int, last: int, num_frames: int, burst_frames: int) -> list[int]:
    """Returns ``num_frames`` ascending distinct indices from ``first`` to ``last`` in bursts of consecutive frames.

    The motion between the frames of a burst is that of the video, and the bursts are spread evenly over it. The last
    burst is shorter where ``burst_frames`` does not divide ``num_frames``. Bursts that would overlap are moved apart.

    Raises:
        ValueError: more frames than the range has.
    """
    total = last - first + 1
    if not 1 <= num_frames <= total:
        raise ValueError(f"num_frames={num_frames} of {total} frames: take at least one and at most all.")
    sizes = [min(burst_frames, num_frames - start) for start in range(0, num_frames, burst_frames)]
    free, gaps = total - num_frames, max(len(sizes) - 1, 1)
    indices: list[int] = []
    for number, size in enumerate(sizes):
        skipped = round(free * number / gaps) if len(sizes) > 1 else free // 2
        start = first + skipped + number * burst_frames
        indices += range(start, start + size)
    return indices


def finer(taken: Sequence[int], changes: Sequence[float], extra: int) -> list[int]:
    """Returns up to ``extra`` new indices in the middle of the intervals that change most.

    Args:
        taken: ascending indices of frames.
        changes: change over each of the ``len(taken) - 1`` intervals. An interval that is halved has half its change on
            each side.
        extra: frames to add; fewer if no interval has a frame inside.
    """
    heap = [(-change, low, high) for change, low, high in zip(changes, taken, taken[1:]) if high - low > 1]
    heapq.heapify(heap)
    added: list[int] = []
    while heap and len(added) < extra:
        change, low, high = heapq.heappop(heap)
        middle = (low + high) // 2
        added.append(middle)
        for a, b in ((low, middle), (middle, high)):
            if b - a > 1:
                heapq.heappush(heap, (change / 2, a, b))
    return sorted(added)


@functools.cache
def registered() -> dict[str, Sampler]:
    """Returns the samplers of installed packages: name → function, loaded on use."""
    return {point.name: _Loaded(point) for point in entry_points(group=GROUP)}


class _Loaded:
    def __init__(self, point: EntryPoint):
        self._point = point

    def __call__(self, timestamps: np.ndarray, num_frames: int, keyframes: Sequence[int]) -> Sequence[int]:
        found = [int(i) for i in self._point.load()(timestamps, num_frames, keyframes)]
        if not found or min(found) < 0 or max(found) >= len(timestamps) or sorted(found) != found:
            raise ValueError(
                f"The sampler {self._point.name!r} ({self._point.value}) returned {found[:8]}: it must return "
                f"ascending indices of 0 to {len(timestamps) - 1}."
            )
        return found
