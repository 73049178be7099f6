"""Limits on time, memory and context of a video, and the reduction of frames and size to meet them."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from blueberry_video.video.ranges import check_above_zero, check_choice

OVERFLOWS = ("error", "fit", "ignore")


@dataclass(frozen=True)
class RunOptions:
    """Limits of processing one video.

    Attributes:
        on_overflow: handling of a video with more tokens than the context of the model: ``error`` (names the frames and
            size that fit), ``fit`` (fewer frames, then fewer pixels) or ``ignore``.
        max_memory_bytes: limit on the resized frames and the formatted output; above it, fewer frames, then fewer
            pixels are taken. None: no limit.
        max_seconds: time limit of one video; if decoding would take longer, fewer frames are taken, finally keyframes.
            A soft limit, checked between chunks; ``timeout`` is the hard limit. None: no limit.
        measure_quality: compute coverage and the statistics of the frames.
        isolate: decode in a separate process, limited by ``timeout`` and ``process_memory_bytes``; ``process_videos``
            always does.
        timeout: seconds; None: no limit.
        process_memory_bytes: memory limit of a process in addition to its memory at start; None: no limit.
    """

    on_overflow: str = "error"
    max_memory_bytes: int | None = None
    max_seconds: float | None = None
    measure_quality: bool = True
    isolate: bool = False
    timeout: float | None = 300.0
    process_memory_bytes: int | None = 8 * 2**30

    def __post_init__(self) -> None:
        check_choice("on_overflow", self.on_overflow, OVERFLOWS)
        check_above_zero(max_memory_bytes=self.max_memory_bytes, max_seconds=self.max_seconds, timeout=self.timeout)
        check_above_zero(process_memory_bytes=self.process_memory_bytes)


def shrink(
    num_frames: int,
    size: tuple[int, int],
    fits: Callable[[int, tuple[int, int]], bool],
    frame_factor: int,
    least_frames: int,
    size_step: int | None,
) -> tuple[int, tuple[int, int]] | None:
    """Reduces the number of frames, then the size, as little as possible until they fit.

    Args:
        num_frames, size: frames and (height, width) that do not fit.
        fits: (frames, size) → whether they fit; must be monotonic in both.
        frame_factor: the number of frames is a multiple of it.
        least_frames: minimum number of frames while the size can still be reduced.
        size_step: sides are multiples of it; None: the size is fixed.

    Returns:
        (frames, size), or None if nothing fits.
    """
    least = -(-min(least_frames, num_frames) // frame_factor)

    def most(fewest: int, size: tuple[int, int]) -> int:
        """Returns the most groups of frames, at least ``fewest``, that fit; 0 if none do."""
        groups = range(fewest, num_frames // frame_factor + 1)
        fitting = bisect_left(groups, True, key=lambda count: not fits(count * frame_factor, size))
        return groups[fitting - 1] if fitting else 0

    if groups := most(least, size):
        return groups * frame_factor, size
    if size_step is None:
        groups = most(1, size)
        return (groups * frame_factor, size) if groups else None

    def scaled(part: int) -> tuple[int, int]:  # thousandths
        height, width = (max(1, side * part // 1000 // size_step) * size_step for side in size)
        return height, width

    part = bisect_left(range(1, 1001), True, key=lambda part: not fits(least * frame_factor, scaled(part)))
    if part:
        return least * frame_factor, scaled(part)
    groups = most(1, scaled(1))
    return (groups * frame_factor, scaled(1)) if groups else None
