"""Which frames a model sees: pure functions from counts and times to frame indices.

Clips of a fixed length for training: ``uniform``, ``random_window``, ``windows``, ``fixed_fps``. Each raises where the
video is shorter than the clip unless ``pad`` is set, which repeats the last frame.

Any video for a multimodal model: ``choose`` with ``SamplingOptions``. Counts and indices of the default are those of
qwen-vl-utils 0.0.14 (``vision_process.py``); the other spacings are those of transformers 5.23. Times are always those
of the frames themselves, so that a range or an interval means the same at a varying rate.
"""

import heapq
import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blueberry_video.video.errors import VideoError

STRATEGIES = ("fps", "uniform", "duration", "keyframes", "adaptive", "all")
SPACINGS = ("inclusive", "linspace", "arange", "steps", "centres")
DEFAULT_FPS = 2.0
TOLERANCE = 1e-6  # seconds: a frame that is due at this very time must not be lost to rounding


@dataclass(frozen=True)
class SamplingOptions:
    """Which frames of a video are taken. At most one of ``fps``, ``num_frames`` and ``indices`` is given.

    Args:
        sampling: ``fps``: ``fps`` frames a second; ``uniform``: ``num_frames`` spread evenly; ``duration``: one frame
            every ``base_interval`` seconds; ``keyframes``: keyframes first, all or evenly thinned, then the middles of
            the widest gaps; ``adaptive``: more frames where the scores of candidate frames are high; ``all``: every
            frame. ``fps`` and ``num_frames`` set the count of ``keyframes`` and ``adaptive`` too.
        fps: frames a second, above 0; null is 2 where the strategy needs a rate.
        num_frames: frames to take, rounded to a multiple of ``frame_factor``.
        indices: frames to take, counted from the start of the video, whatever ``sampling`` says.
        base_interval: seconds between frames of ``duration``, above 0.
        min_frames: at least so many frames (of all strategies but explicit counts), as far as the video has them.
        max_frames: as ``min_frames``, at most so many; wins over it; at least ``frame_factor``.
        frame_factor: the count is a multiple of it (frames a token spans); a video with fewer frames repeats its last.
        spacing: how indices are spread. ``inclusive``: from the first to the last frame, rounded in single precision
            (qwen-vl-utils); ``linspace``: the same in double precision (Qwen3-VL in transformers); ``arange``: floors
            of equal steps in single precision, without the last frame (Qwen2-VL in transformers); ``steps``: the same
            in whole numbers (the default of transformers); ``centres``: the middles of equal parts (InternVL).
        by_time: spread ``fps`` and ``uniform`` evenly in time, whatever ``spacing`` says; but for exact halves the same
            as ``inclusive`` at a steady rate.
        pad_frames: repeat the last frame where a video has fewer than ``num_frames``, instead of raising.
        candidates_per_frame: candidate frames of ``adaptive`` for every frame taken, at least 1.
        uniform_share: share of ``adaptive`` that is spread evenly whatever the scores, 0 to 1.
        video_start: seconds after the first frame; frames before are not seen. Null is the start.
        video_end: seconds after the first frame; frames after are not seen. Null is the end.

    Raises:
        ValueError: a value out of range, or values that contradict each other.
    """

    sampling: str = "fps"
    fps: float | None = None
    num_frames: int | None = None
    indices: tuple[int, ...] | None = None
    base_interval: float = 4.0
    min_frames: int = 4
    max_frames: int = 768
    frame_factor: int = 2
    spacing: str = "inclusive"
    by_time: bool = False
    pad_frames: bool = False
    candidates_per_frame: int = 4
    uniform_share: float = 0.25
    video_start: float | None = None
    video_end: float | None = None

    def __post_init__(self) -> None:
        if self.indices is not None:
            object.__setattr__(self, "indices", tuple(self.indices))
        for key, allowed in (("sampling", STRATEGIES), ("spacing", SPACINGS)):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}={getattr(self, key)!r} does not exist: choose from {', '.join(allowed)}.")
        lowest = {"frame_factor": 1, "min_frames": 1, "max_frames": self.frame_factor, "candidates_per_frame": 1}
        lowest["num_frames"] = self.frame_factor // 2 + 1  # what rounds to one factor
        for key, least in lowest.items():
            if getattr(self, key) is not None and getattr(self, key) < least:
                raise ValueError(f"{key}={getattr(self, key)} is out of range: use at least {least}.")
        for key in ("fps", "base_interval"):
            if getattr(self, key) is not None and not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"{key}={getattr(self, key)} is out of range: use a number above 0.")
        if not 0 <= self.uniform_share <= 1:
            raise ValueError(f"uniform_share={self.uniform_share} is outside 0 to 1: it is a share, such as 0.25.")
        given = {key: getattr(self, key) for key in ("fps", "num_frames", "indices") if getattr(self, key) is not None}
        if len(given) > 1:
            told = " and ".join(f"{key}={value}" for key, value in given.items())
            raise ValueError(f"{told} contradict each other: give one of fps, num_frames and indices.")
        if self.indices is None and self.sampling == "uniform" and self.num_frames is None:
            raise ValueError("sampling='uniform' needs num_frames; for a rate use sampling='fps' with fps.")
        if self.sampling in ("duration", "all") and (self.fps is not None or self.num_frames is not None):
            told = f"sampling={self.sampling!r} does not use fps={self.fps} or num_frames={self.num_frames}"
            raise ValueError(f"{told}: leave them out, or use sampling='fps'.")
        if not 0 <= (self.video_start or 0) <= (math.inf if self.video_end is None else self.video_end):
            raise ValueError(
                f"video_start={self.video_start} and video_end={self.video_end} are no range: use seconds after the "
                "first frame, at least 0, the start before the end."
            )


def choose(
    timestamps: np.ndarray,
    options: SamplingOptions,
    keyframes: Sequence[int] = (),
    scores: Tensor | Sequence[float] | None = None,
    rate: float | None = None,
) -> list[int]:
    """The frames to decode, in order, counted from the start of the video.

    Args:
        timestamps: float64 (N,), seconds of every frame of the video, ascending, starting anywhere.
        options: which frames.
        keyframes: indices of the keyframes; needed by ``sampling='keyframes'``.
        scores: one a frame of ``candidate_frames``, needed by ``sampling='adaptive'``: ``change_scores`` of them, or
            whatever says how much a frame matters; at least 0.
        rate: frames a second that the container states for the whole video; without it ``frame_rate`` of the
            timestamps. Hand on no rate that was itself computed from timestamps: it lacks the rounding that makes
            counts exact.

    Raises:
        ValueError: options that this video cannot meet: an empty range, more frames than there are, an index outside.
        VideoError: no timestamps, or ones that are not ascending finite numbers.
    """
    times = _checked_times(timestamps)
    if (scores is None) == (options.sampling == "adaptive" and options.indices is None):
        told = f"sampling={options.sampling!r} {'needs' if scores is None else 'takes no'} scores"
        raise ValueError(f"{told}: sampling='adaptive' takes one for each of candidate_frames, nothing else does.")
    first, last = time_range(times, options.video_start, options.video_end)
    if options.indices is not None:
        chosen = _explicit(options.indices, first, last)
    elif options.sampling == "all":
        chosen = _every(first, last, options.max_frames)
    elif options.sampling == "duration":
        limits = (options.min_frames, options.max_frames, options.frame_factor)
        chosen = [first + i for i in every_interval(times[first : last + 1], options.base_interval, *limits)]
    elif options.sampling == "keyframes":
        inside = sorted({int(k) for k in keyframes if first <= k <= last})
        chosen = prefer_keyframes(inside, first, last, _count(times, first, last, options, rate, len(inside)))
    elif scores is not None:
        count = _count(times, first, last, options, rate)
        chosen = by_scores(scores, candidate_frames(times, options, rate), count, options.uniform_share)
    else:
        count = _count(times, first, last, options, rate)
        if options.by_time:
            even = np.linspace(times[first], times[last], count)
            chosen = [first + i for i in nearest(times[first : last + 1], even)]
        else:
            chosen = spread(first, last, count, options.spacing)
    wanted = _rounded_count(options) if options.num_frames is not None else len(chosen)
    wanted = math.ceil(wanted / options.frame_factor) * options.frame_factor
    return chosen + [chosen[-1]] * (wanted - len(chosen))


def candidate_frames(timestamps: np.ndarray, options: SamplingOptions, rate: float | None = None) -> list[int]:
    """The frames that ``sampling='adaptive'`` wants scored: ``candidates_per_frame`` for each that will be taken,
    spread evenly over the range.

    Raises:
        ValueError, VideoError: as ``choose``.
    """
    times = _checked_times(timestamps)
    first, last = time_range(times, options.video_start, options.video_end)
    count = _count(times, first, last, options, rate) * options.candidates_per_frame
    return spread(first, last, min(count, last - first + 1), "linspace")


def frame_rate(timestamps: np.ndarray) -> float:
    """Frames a second: (n - 1) / (last - first), or the whole or NTSC rate (30000/1001, …) that explains the
    timestamps to a millisecond, which is as finely as some containers write them. Counts are floors of products with
    it: 29.999999 would lose two frames.

    Raises:
        VideoError: all timestamps are the same.
    """
    span = float(timestamps[-1] - timestamps[0])
    steps = len(timestamps) - 1
    if span <= 0:
        raise VideoError(f"The video's {len(timestamps)} frames all have the time {timestamps[0]} s: re-encode it.")
    rate = steps / span
    known = [k for k in (round(rate), round(rate * 1.001) * 1000 / 1001) if k > 0]
    closest = min(known, key=lambda k: abs(k - rate), default=rate)
    return closest if abs(steps / closest - span) <= 1e-3 + TOLERANCE else rate


def smart_num_frames(
    total: int, rate: float, fps: float = DEFAULT_FPS, min_frames: int = 4, max_frames: int = 768, frame_factor: int = 2
) -> int:
    """How many of ``total`` frames at ``rate`` frames a second show ``fps`` frames a second: a multiple of
    ``frame_factor``, rounded down; ``total`` itself where that is less than one factor.

    As ``smart_nframes`` of qwen-vl-utils, and with ``frame_factor=1`` as Qwen3-VL in transformers.
    """
    return _limited(total / rate * fps, total, min_frames, max_frames, frame_factor)


def spread(first: int, last: int, num_frames: int, spacing: str = "inclusive") -> list[int]:
    """``num_frames`` indices from ``first`` to ``last``, ascending; ``spacing`` as in ``SamplingOptions``."""
    total = last - first + 1
    if spacing == "inclusive":
        return torch.linspace(first, last, num_frames).round().long().clamp_(first, last).tolist()
    if spacing == "linspace":
        return np.linspace(first, last, num_frames).round().astype(int).tolist()
    if spacing == "arange":  # rounding may give one index more than steps
        return [first + i for i in torch.arange(0, total, total / num_frames).int()[:num_frames].tolist()]
    if spacing == "centres":
        return [first + i for i in torch.arange(total / num_frames / 2, total, total / num_frames).int().tolist()]
    return [first + i * total // num_frames for i in range(num_frames)]


def nearest(timestamps: np.ndarray, times: np.ndarray) -> list[int]:
    """The frame whose timestamp is closest to each time, the earlier of two; frames repeat where they are far apart."""
    after = np.searchsorted(timestamps, times).clip(1, max(len(timestamps) - 1, 1))
    before = after - 1
    late = np.abs(timestamps[after.clip(max=len(timestamps) - 1)] - times) < np.abs(timestamps[before] - times) - 1e-9
    return np.where(late, after, before).tolist()


def time_range(timestamps: np.ndarray, start: float | None = None, end: float | None = None) -> tuple[int, int]:
    """The first and the last frame shown from ``start`` to ``end``, seconds after the first frame.

    Raises:
        ValueError: there is none.
    """
    shown = timestamps - timestamps[0]
    first = int(np.searchsorted(shown, (start or 0.0) - TOLERANCE))
    last = len(shown) - 1 if end is None else int(np.searchsorted(shown, end + TOLERANCE, side="right")) - 1
    if first > last:
        raise ValueError(
            f"No frame lies between video_start={start} and video_end={end}: the video's {len(shown)} frames span "
            f"0 to {shown[-1]:.6g} s. Choose a range in it."
        )
    return first, last


def every_interval(
    timestamps: np.ndarray,
    base_interval: float = 4.0,
    min_frames: int = 4,
    max_frames: int = 768,
    frame_factor: int = 2,
) -> list[int]:
    """round(duration / ``base_interval``) frames at even times from the first to the last, within the limits and in
    multiples of ``frame_factor``; frames repeat where they are farther apart than that."""
    span = float(timestamps[-1] - timestamps[0])
    duration = span + span / max(len(timestamps) - 1, 1)  # the last frame is shown for a while too
    count = _limited(round(duration / base_interval), len(timestamps), min_frames, max_frames, frame_factor)
    return nearest(timestamps, np.linspace(timestamps[0], timestamps[-1], count))


def prefer_keyframes(keyframes: Sequence[int], first: int, last: int, num_frames: int) -> list[int]:
    """``num_frames`` frames from ``first`` to ``last`` (all, where there are no more): keyframes, ascending, evenly
    thinned where there are more of them; where there are fewer, filled up with whatever frame is then the farthest
    from those taken."""
    if len(keyframes) >= num_frames:
        return [keyframes[i] for i in spread(0, len(keyframes) - 1, num_frames, "linspace")]
    taken = list(keyframes) or [first]
    # mirrored at the ends, so that the middle of an outer gap is the end itself
    edges = [2 * first - taken[0], *taken, 2 * last - taken[-1]]
    gaps = [(low - high, low, high) for low, high in itertools.pairwise(edges) if high - low > 1]
    heapq.heapify(gaps)
    while gaps and len(taken) < num_frames:
        _, low, high = heapq.heappop(gaps)  # the widest, then the earliest
        middle = (low + high) // 2
        taken.append(middle)
        for a, b in ((low, middle), (middle, high)):
            if first <= a and b <= last and b - a > 1:
                heapq.heappush(gaps, (a - b, a, b))
    return sorted(taken)


def by_scores(
    scores: Tensor | Sequence[float], candidates: Sequence[int], num_frames: int, uniform_share: float = 0.25
) -> list[int]:
    """``num_frames`` different candidates at equal steps of the cumulative score: the more, the higher the scores.

    A score belongs to the step that leads to its candidate, so a scene cut gets frames on both of its sides, the first
    candidate is always taken, and the last too where there are two frames or more.

    Args:
        scores: (N,), at least 0.
        candidates: N frame indices, ascending.
        num_frames: 1 to N.
        uniform_share: share of the total that every step gets alike, so that still parts keep some frames.

    Raises:
        ValueError: scores that are negative, not finite or not N; ``num_frames`` out of range.
    """
    values, total = torch.as_tensor(scores, dtype=torch.float64).cpu(), len(candidates)
    if values.shape != (total,) or not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ValueError(
            f"scores of shape {tuple(values.shape)} for {total} candidate frames: there must be one finite number of "
            "at least 0 for each."
        )
    if not 1 <= num_frames <= total:
        raise ValueError(f"num_frames={num_frames} of {total} candidate frames: take at least one and at most all.")
    steps = values[1:].numpy()
    even = np.full(total - 1, 1 / max(total - 1, 1))
    share = steps / steps.sum() if steps.sum() > 0 else even
    reached = np.concatenate([[0.0], np.cumsum((1 - uniform_share) * share + uniform_share * even)])
    places = nearest(reached, np.linspace(0, reached[-1], num_frames))
    for k in range(1, num_frames):  # several steps within one jump: the next candidates
        places[k] = max(places[k], places[k - 1] + 1)
    places[-1] = max(places[-1], total - 1 if num_frames > 1 else 0)  # also where the last scores are 0
    return [candidates[min(place, total - num_frames + k)] for k, place in enumerate(places)]


def change_scores(frames: Tensor) -> Tensor:
    """How much each frame differs from the one before: uint8 (N, 3, h, w) RGB to float32 (N,), 0 to 1, 0 for the first.

    The mean difference of luma and the two colour differences (BT.601). Frames some 160 pixels wide are enough: more
    measures noise.

    Raises:
        ValueError: frames of another type or shape.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or frames.numel() == 0:
        raise ValueError(f"frames are {frames.dtype} of shape {tuple(frames.shape)}: use uint8 (N, 3, h, w).")
    to_ycc = torch.tensor(
        [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], device=frames.device
    )
    scores = torch.zeros(len(frames), device=frames.device)
    before = to_ycc @ frames[0].flatten(1).float()
    for i in range(1, len(frames)):
        after = to_ycc @ frames[i].flatten(1).float()
        scores[i] = (after - before).abs().mean() / 255
        before = after
    return scores


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


def _checked_times(timestamps: np.ndarray) -> np.ndarray:
    times = np.asarray(timestamps, dtype=np.float64)
    if times.ndim != 1 or not len(times) or not np.isfinite(times).all() or (np.diff(times) < 0).any():
        raise VideoError(f"The timestamps of {times.size} frames are no ascending finite seconds: re-encode the video.")
    return times


def _count(
    times: np.ndarray, first: int, last: int, options: SamplingOptions, rate: float | None, natural: int | None = None
) -> int:
    """How many different frames to take; ``natural`` where neither a count nor a rate is asked for."""
    total = last - first + 1
    if options.num_frames is not None:
        wanted = _rounded_count(options)
        if wanted > max(total, options.frame_factor) and not options.pad_frames:
            raise ValueError(
                f"num_frames={options.num_frames} (in multiples of {options.frame_factor}: {wanted}) of {total} frames "
                "that the video or its range has: lower num_frames, or set pad_frames=true to repeat the last frame."
            )
        return min(wanted, total)
    limits = (options.min_frames, options.max_frames, options.frame_factor)
    if total == 1:
        return 1
    if natural is not None and options.fps is None:
        return _limited(natural + -natural % options.frame_factor, total, *limits)  # up: all of them, where they fit
    rate = rate or frame_rate(times)
    if options.by_time:  # the same number at a steady rate; rounded, for a sum of times is not exact
        rate = total / round(float(times[last] - times[first]) + 1 / rate, 6)
    return smart_num_frames(total, rate, options.fps or DEFAULT_FPS, *limits)


def _rounded_count(options: SamplingOptions) -> int:
    return round((options.num_frames or 0) / options.frame_factor) * options.frame_factor


def _limited(wanted: float, total: int, min_frames: int, max_frames: int, frame_factor: int) -> int:
    if total < frame_factor:
        return total
    least = math.ceil(min_frames / frame_factor) * frame_factor
    most = math.floor(min(max_frames, total) / frame_factor) * frame_factor
    return math.floor(min(max(wanted, least), most) / frame_factor) * frame_factor


def _explicit(indices: Sequence[int], first: int, last: int) -> list[int]:
    outside = [i for i in indices if not first <= i <= last]
    if outside or not indices:
        raise ValueError(
            f"indices={list(indices)[:8]} name the frames {outside[:8]}, but the video, or its range from video_start "
            f"to video_end, has the frames {first} to {last}: ask for at least one of these."
        )
    return list(indices)


def _every(first: int, last: int, max_frames: int) -> list[int]:
    if last - first + 1 > max_frames:
        raise ValueError(
            f"sampling='all' would take {last - first + 1} frames, above max_frames={max_frames}: raise max_frames, "
            "choose a range, or use sampling='fps'."
        )
    return list(range(first, last + 1))
