"""How much time, memory and context a video may take, and what is given up where it takes more."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

OVERFLOWS = ("error", "fit", "ignore")


@dataclass(frozen=True)
class RunOptions:
    """Limits of processing one video.

    Attributes:
        on_overflow: what happens to a video of more tokens than the model's context takes: ``error`` (naming what would
            fit), ``fit`` (fewer frames, then fewer pixels) or ``ignore``.
        max_memory_bytes: of the resized frames and what is formatted from them; above it, fewer frames, then fewer
            pixels are taken. None: no limit.
        max_seconds: of one video; where decoding would take longer, fewer frames are taken, at last keyframes. A goal,
            measured between chunks; ``timeout`` is the wall. None: no limit.
        measure_quality: compute coverage and what the frames show.
        isolate: decode in a process of its own, which ``timeout`` and ``process_memory_bytes`` end; ``process_videos``
            always does.
        timeout: seconds; None: no limit.
        process_memory_bytes: what a process may take beyond what it has at its start; None: no limit.
    """

    on_overflow: str = "error"
    max_memory_bytes: int | None = None
    max_seconds: float | None = None
    measure_quality: bool = True
    isolate: bool = False
    timeout: float | None = 300.0
    process_memory_bytes: int | None = 8 * 2**30

    def __post_init__(self) -> None:
        if self.on_overflow not in OVERFLOWS:
            raise ValueError(f"on_overflow={self.on_overflow!r} does not exist: choose from {', '.join(OVERFLOWS)}.")
        for key in ("max_memory_bytes", "max_seconds", "timeout", "process_memory_bytes"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ValueError(f"{key}={value} must be above 0: raise it, or use null for no limit.")


def shrink(
    num_frames: int,
    size: tuple[int, int],
    fits: Callable[[int, tuple[int, int]], bool],
    frame_factor: int,
    least_frames: int,
    size_step: int | None,
) -> tuple[int, tuple[int, int]] | None:
    """The most frames, and only then the largest size, that fit.

    Args:
        num_frames, size: what does not fit: frames and (height, width).
        fits: whether so many frames of a size do; must not turn false where either falls.
        frame_factor: frames are taken in multiples of it.
        least_frames: so many are kept as long as the size can still fall.
        size_step: sides are multiples of it; None: the model takes no other size.

    Returns:
        (frames, size), or None where nothing fits.
    """
    least = -(-min(least_frames, num_frames) // frame_factor)

    def most(fewest: int, size: tuple[int, int]) -> int:
        """The most groups of frames from ``fewest`` on that fit; 0 for none."""
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
