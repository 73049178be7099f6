"""Times of frames: the frame rate, the frame on screen at a time, ranges in seconds.

All functions take the timestamps of the frames, so that they are correct at a variable frame rate, with any first
timestamp. A frame is on screen from its timestamp to that of the next one; the last, to the end of the video.
"""

import math

import numpy as np

from blueberry_video.video.errors import VideoError

TOLERANCE = 1e-6  # seconds: rounding must not drop a frame that starts at exactly a requested time


def checked_times(timestamps: np.ndarray) -> np.ndarray:
    """Returns timestamps as float64 (N,). Raises VideoError if there are none, or if they do not ascend."""
    times = np.asarray(timestamps, dtype=np.float64)
    if times.ndim != 1 or not len(times) or not np.isfinite(times).all() or (np.diff(times) < 0).any():
        raise VideoError(f"The timestamps of {times.size} frames are not ascending finite seconds: re-encode it.")
    return times


def frame_rate(timestamps: np.ndarray, duration: float | None = None) -> float:
    """Returns the frames per second: n / ``duration``, or the integer or NTSC rate (30000/1001, …) that matches the
    timestamps to a millisecond, the resolution of some containers. Counts are floors of products with the rate, so
    29.999999 would lose two frames. Raises VideoError if all timestamps are the same.

    Args:
        timestamps: seconds of every frame, ascending.
        duration: seconds from the first frame to the end of the last; the display time of the last frame is the mean
            interval if None, so that the rate is (n - 1) / (last - first).
    """
    span = float(timestamps[-1] - timestamps[0])
    steps = len(timestamps) - 1
    if span <= 0:
        raise VideoError(f"All {len(timestamps)} frames have the timestamp {timestamps[0]} s: re-encode the video.")
    rate = steps / span
    known = [k for k in (round(rate), round(rate * 1.001) * 1000 / 1001) if k > 0]
    closest = min(known, key=lambda k: abs(k - rate), default=rate)
    is_known = abs(steps / closest - span) <= 1e-3 + TOLERANCE
    shown = None if duration is None else duration - span  # display time of the last frame
    if shown is None or abs(shown - 1 / rate) <= 1e-3 + TOLERANCE:
        return closest if is_known else rate
    return len(timestamps) / (span + shown)


def on_screen(timestamps: np.ndarray, times: np.ndarray) -> list[int]:
    """Returns the frame on screen at each time: the last that begins at or before it, or the first frame before that;
    held frames repeat. A time that rounding puts just before a frame is that of the frame."""
    return (np.searchsorted(timestamps, times + TOLERANCE, side="right") - 1).clip(0).tolist()


def time_range(
    timestamps: np.ndarray,
    start: float | None = None,
    end: float | None = None,
    duration: float | None = None,
    by_time: bool = False,
) -> tuple[int, int]:
    """Returns the first and last frame from ``start`` to ``end``, in seconds after the first frame.

    The last is the frame on screen at ``end``. The first is the first that begins in the range, as in qwen-vl-utils, or
    the one on screen at ``start`` if that is held: past ``end``, or for at least two mean intervals from ``start`` on.

    Args:
        timestamps: seconds of every frame, ascending.
        start, end: the range; None is the start or the end of the video.
        duration: seconds from the first frame to the end of the last; the display time of the last frame is the mean
            interval if None.
        by_time: begin with the frame on screen in any case.

    Raises:
        ValueError: ``start`` is after the end of the last frame.
    """
    shown = timestamps - timestamps[0]
    interval = float(shown[-1]) / max(len(shown) - 1, 1)
    length = max(float(shown[-1]) + interval if duration is None else duration, float(shown[-1]))
    start = start or 0.0
    first = int(np.searchsorted(shown, start - TOLERANCE))
    if first == len(shown) and start > length - TOLERANCE:
        raise ValueError(
            f"video_start={start} and video_end={end} contain no frame: the {len(shown)} frames of the video span 0 to "
            f"{length:.6g} s, choose a range within it."
        )
    last = len(shown) - 1 if end is None else on_screen(shown, np.array([end]))[0]
    [held] = on_screen(shown, np.array([start]))
    held_for = (float(shown[first]) if first < len(shown) else length) - start
    return (held if by_time or first > last or held_for >= 2 * interval > 0 else first), last


def seconds_on_screen(
    timestamps: np.ndarray,
    frames: tuple[int, int],
    start: float | None = None,
    end: float | None = None,
    duration: float | None = None,
) -> tuple[float, float]:
    """Returns the time from which the first and last frame of a range are on screen, and the time at which the last one
    ends, at most a mean interval after ``end``; the arguments are those of :func:`time_range`."""
    first, last = frames
    times, origin = timestamps, float(timestamps[0])
    interval = float(times[-1] - times[0]) / max(len(times) - 1, 1)
    begins = max(float(times[first]), origin + (start or 0.0))
    ends = origin + duration if duration is not None else float(times[-1]) + interval
    ends = float(times[last + 1]) if last + 1 < len(times) else ends
    if end is not None:
        ends = min(ends, origin + end + interval)
    return begins, max(begins, float(times[last]), ends)


def even_times(times: np.ndarray, count: int, start: float, end: float) -> np.ndarray:
    """Returns ``count`` evenly spaced times from ``start`` to the last frame, or to one mean interval before ``end`` if
    the last frame is held."""
    interval = float(times[-1] - times[0]) / max(len(times) - 1, 1)
    return np.linspace(start, max(start, float(times[-1]), end - interval), count)


def every_interval(
    timestamps: np.ndarray,
    base_interval: float = 4.0,
    min_frames: int = 4,
    max_frames: int = 768,
    frame_factor: int = 2,
    start: float | None = None,
    end: float | None = None,
) -> list[int]:
    """Returns round((end - start) / ``base_interval``) frames, within the limits and in multiples of ``frame_factor``:
    those on screen at evenly spaced times. Held frames repeat.

    Args:
        timestamps: seconds of the frames, ascending.
        base_interval: seconds between frames.
        min_frames, max_frames, frame_factor: see ``SamplingOptions``.
        start: time of the first frame to take, not before the first timestamp; the first timestamp if None.
        end: time at which the last frame ends; one mean interval after its timestamp if None.
    """
    start = float(timestamps[0]) if start is None else start
    if end is None:
        end = float(timestamps[-1]) + float(timestamps[-1] - timestamps[0]) / max(len(timestamps) - 1, 1)
    wanted = round(round(end - start, 6) / base_interval)
    count = limited_count(wanted, len(timestamps), min_frames, max_frames, frame_factor)
    return on_screen(timestamps, even_times(timestamps, count, start, end))


def limited_count(wanted: float, total: int, min_frames: int, max_frames: int, frame_factor: int) -> int:
    """Returns ``wanted`` within the limits, rounded down to a multiple of ``frame_factor``; ``total`` if that is less
    than one factor."""
    if total < frame_factor:
        return total
    least = math.ceil(min_frames / frame_factor) * frame_factor
    most = math.floor(min(max_frames, total) / frame_factor) * frame_factor
    return math.floor(min(max(wanted, least), most) / frame_factor) * frame_factor
