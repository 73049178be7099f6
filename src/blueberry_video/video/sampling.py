"""Which frames of a video make a clip: pure functions from counts and times to frame indices.

Each raises where the video is shorter than the clip unless ``pad`` is set, which repeats the last frame.
"""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np


def uniform(total: int, num_frames: int, pad: bool = False) -> list[int]:
    """``num_frames`` indices spread evenly over the whole video, first and last frame included; the middle frame for
    one.

    Raises:
        ValueError: ``total`` < ``num_frames`` without ``pad``, or a value below 1.
    """
    if _too_short(total, num_frames, 1, pad):
        return _padded(total, num_frames, 1)
    if num_frames == 1:
        return [total // 2]
    return [round(i * (total - 1) / (num_frames - 1)) for i in range(num_frames)]


def random_window(
    total: int, num_frames: int, rng: np.random.Generator, stride: int = 1, pad: bool = False
) -> list[int]:
    """Every ``stride``-th frame of a window at a random start drawn from ``rng``.

    Raises:
        ValueError: the window of (num_frames - 1) · stride + 1 frames is longer than the video without ``pad``, or a
            value below 1.
    """
    if _too_short(total, num_frames, stride, pad):
        return _padded(total, num_frames, stride)
    start = int(rng.integers(total - _span(num_frames, stride) + 1))
    return list(range(start, start + _span(num_frames, stride), stride))


def windows(total: int, num_frames: int, num_clips: int, stride: int = 1, pad: bool = False) -> list[list[int]]:
    """``num_clips`` windows whose starts are spread evenly from the first possible to the last; the middle one for one.

    Raises:
        ValueError: as ``random_window``.
    """
    if num_clips < 1:
        raise ValueError(f"num_clips={num_clips} takes no clip from a video: use at least 1.")
    if _too_short(total, num_frames, stride, pad):
        return [_padded(total, num_frames, stride)] * num_clips
    span = _span(num_frames, stride)
    last = total - span
    starts = [last // 2] if num_clips == 1 else [round(i * last / (num_clips - 1)) for i in range(num_clips)]
    return [list(range(start, start + span, stride)) for start in starts]


def fixed_fps(
    timestamps: Sequence[float], num_frames: int, fps: float, rng: np.random.Generator | None = None, pad: bool = False
) -> list[int]:
    """The frames on display at ``num_frames`` times 1 / ``fps`` seconds apart, correct also where the frame rate
    varies.

    Args:
        timestamps: seconds of every frame of the video, ascending.
        num_frames: frames to take.
        fps: frames a second of the clip; above the video's own rate, frames repeat.
        rng: draws the start; without it the clip lies in the middle of the video.
        pad: repeat the last frame where the video ends before the clip.

    Raises:
        ValueError: the clip lasts longer than the video without ``pad``, or a value out of range.
    """
    if fps <= 0 or num_frames < 1 or not timestamps:
        raise ValueError(
            f"fps={fps} and num_frames={num_frames} on a video of {len(timestamps)} frames: use fps > 0 and at least "
            "one frame."
        )
    slack = timestamps[-1] - timestamps[0] - (num_frames - 1) / fps
    if slack < -1e-6 and not pad:
        raise ValueError(
            f"num_frames={num_frames} at fps={fps} last {(num_frames - 1) / fps:.3g} s, but the video's "
            f"{len(timestamps)} frames span {timestamps[-1] - timestamps[0]:.3g} s: lower num_frames, raise fps, or "
            "set pad=true to repeat the last frame."
        )
    start = timestamps[0] + max(slack, 0.0) * (rng.random() if rng is not None else 0.5)
    # a microsecond of tolerance: rounding must not show the frame before the one that starts at this very time
    return [max(bisect_right(timestamps, start + i / fps + 1e-6) - 1, 0) for i in range(num_frames)]


def _span(num_frames: int, stride: int) -> int:
    return (num_frames - 1) * stride + 1


def _too_short(total: int, num_frames: int, stride: int, pad: bool) -> bool:
    if min(total, num_frames, stride) < 1:
        raise ValueError(
            f"num_frames={num_frames} with stride={stride} from a video of {total} frames: each must be at least 1."
        )
    short = total < _span(num_frames, stride)
    if short and not pad:
        raise ValueError(
            f"num_frames={num_frames} with stride={stride} needs a video of {_span(num_frames, stride)} frames, but "
            f"this one has {total}: lower num_frames or stride, or set pad=true to repeat the last frame."
        )
    return short


def _padded(total: int, num_frames: int, stride: int) -> list[int]:
    return [min(i * stride, total - 1) for i in range(num_frames)]
