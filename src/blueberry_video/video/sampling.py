"""Frame sampling: pure functions from frame counts and timestamps to frame indices.

Clips of a fixed length for training: ``choose_clip`` with ``ClipSampling``, over ``uniform``, ``random_window``,
``windows`` and ``fixed_fps``. Each raises for a video shorter than the clip unless ``pad`` is set, which repeats the
last frame.

Videos of any length for a multimodal model: ``choose`` with ``SamplingOptions``. Counts and indices of the default
equal those of qwen-vl-utils 0.0.14 (``vision_process.py``); the other spacings equal those of transformers 5.23. Times
are the timestamps of the frames, so that ranges and intervals are correct at a variable frame rate.
"""

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from blueberry_video.video.ranges import check_above_zero, check_at_least, check_between, check_choice
from blueberry_video.video.refinement import bursts, registered
from blueberry_video.video.times import (
    TOLERANCE,
    checked_times,
    even_times,
    every_interval,
    frame_rate,
    limited_count,
    on_screen,
    seconds_on_screen,
    time_range,
)

SAMPLERS = ("uniform", "random", "fixed_fps", "multi_clip", "segments")
STRATEGIES = ("fps", "uniform", "duration", "keyframes", "adaptive", "progressive", "bursts", "all")
FRAME_LISTS = ("whole", "sampled")
SPACINGS = ("inclusive", "linspace", "arange", "steps", "centres")
DEFAULT_FPS = 2.0


@dataclass(frozen=True)
class ClipSampling:
    """Sampling of clips of a fixed length, for training and evaluation; the fields are config keys of the datasets.

    Args:
        sampler: ``uniform``: spread over the whole video; ``random``: a window of every ``stride``-th frame at a random
            start; ``fixed_fps``: frames 1 / ``fps`` s apart, in the middle of the video; ``multi_clip``:
            ``num_clips`` evenly spaced windows of every ``stride``-th frame; ``segments``: one window in each of
            ``num_clips`` parts of the video, one after the other in one clip (see :func:`segments`).
        num_frames: frames of a clip, or of each window of ``segments``.
        stride: frame step of ``random``, ``multi_clip`` and ``segments``.
        fps: frames per second of ``fixed_fps``.
        num_clips: windows per video of ``multi_clip`` and ``segments``.
        pad: repeat the last frame of videos shorter than the clip, instead of raising.

    Raises:
        ValueError: an unknown sampler, or an argument that the sampler ignores or lacks.
    """

    sampler: str
    num_frames: int
    stride: int = 1
    fps: float | None = None
    num_clips: int = 1
    pad: bool = False

    def __post_init__(self) -> None:
        check_choice("sampler", self.sampler, SAMPLERS)
        given = f"with sampler={self.sampler!r}"
        if (self.fps is not None) != (self.sampler == "fixed_fps"):
            raise ValueError(f"fps={self.fps} {given}: sampler=fixed_fps requires fps, the other samplers ignore it.")
        if self.stride != 1 and self.sampler not in ("random", "multi_clip", "segments"):
            raise ValueError(f"stride={self.stride} {given}: only sampler=random, multi_clip and segments use stride.")
        if self.num_clips < 1 or (self.num_clips > 1 and self.sampler not in ("multi_clip", "segments")):
            raise ValueError(f"num_clips={self.num_clips} {given}: use sampler=multi_clip or segments, and at least 1.")


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling of a video of any length. At most one of ``fps``, ``num_frames`` and ``indices`` is set.

    Args:
        sampling: ``fps``: ``fps`` frames per second; ``uniform``: ``num_frames`` spread evenly; ``duration``: one frame
            every ``base_interval`` seconds; ``keyframes``: keyframes first, all or evenly thinned, then the middles of
            the widest gaps; ``adaptive``: more frames where the scores of candidate frames are high; ``progressive``:
            evenly spaced frames first, then rounds that add frames where neighbors differ most; ``bursts``: groups of
            consecutive frames, spread evenly, which keep the motion of the video; ``all``: every frame; or the name of
            an entry point of the group ``blueberry.video.samplers``. ``fps`` and ``num_frames`` also set the count of
            all but ``duration`` and ``all``.
        fps: frames per second, above 0; null is 2 where the strategy requires a rate.
        num_frames: frames to take, rounded to a multiple of ``frame_factor``.
        indices: frames to take, counted from the start of the video; ``sampling`` is then ignored.
        base_interval: seconds between frames of ``duration``, above 0.
        min_frames: lower limit of the count (of all strategies but explicit counts), as far as the video has frames.
        max_frames: upper limit of the count; takes precedence over ``min_frames``; at least ``frame_factor``.
        frame_factor: the count is a multiple of it (frames per token); a video with fewer frames repeats its last.
        spacing: spacing of the indices. ``inclusive``: from the first to the last frame, rounded in single precision
            (qwen-vl-utils); ``linspace``: the same in double precision (Qwen3-VL in transformers); ``arange``: floors
            of equal steps in single precision, without the last frame (Qwen2-VL in transformers); ``steps``: the same
            in integers (the default of transformers); ``centres``: the middles of equal parts (InternVL).
        by_time: spread ``fps`` and ``uniform`` evenly in time and ignore ``spacing``: the frames on screen at evenly
            spaced times, which at a constant rate are ``linspace`` rounded down. ``fps`` then counts the seconds of
            the range, not its frames.
        pad_frames: repeat the last frame of a video with fewer than ``num_frames``, instead of raising.
        candidates_per_frame: candidate frames of ``adaptive`` per frame taken, at least 1.
        rounds: rounds of ``progressive``, at least 1; each doubles the frames, so that 3 begins with a quarter.
        burst_frames: consecutive frames of ``bursts``, at least 1.
        uniform_share: share of ``adaptive`` that is spread evenly regardless of the scores, 0 to 1.
        frame_lists: frames of a list or folder under ``fps``. ``whole``: all of them up to ``max_frames``, since they
            are sampled already (qwen-vl-utils); ``sampled``: as a file, if their rate is known (``frames_fps``). An
            override of ``fps`` or ``sampling`` sets ``sampled``.
        video_start: seconds after the first frame; frames that begin earlier are ignored, except the one on screen
            if it is held: for at least two mean intervals from there on, or past ``video_end``. With ``by_time`` and
            ``duration`` the one on screen always counts. Null is the start.
        video_end: seconds after the first frame; later frames are ignored. Null is the end.

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
    rounds: int = 3
    burst_frames: int = 4
    uniform_share: float = 0.25
    frame_lists: str = "whole"
    video_start: float | None = None
    video_end: float | None = None

    def __post_init__(self) -> None:
        if self.indices is not None:
            object.__setattr__(self, "indices", tuple(self.indices))
        if self.sampling not in STRATEGIES:
            check_choice("sampling", self.sampling, (*STRATEGIES, *registered()))
        check_choice("spacing", self.spacing, SPACINGS)
        check_choice("frame_lists", self.frame_lists, FRAME_LISTS)
        counts = {key: getattr(self, key) for key in ("frame_factor", "min_frames", "candidates_per_frame")}
        counts |= {key: getattr(self, key) for key in ("rounds", "burst_frames")}
        check_at_least(1, **counts)
        check_at_least(self.frame_factor, max_frames=self.max_frames)
        check_at_least(self.frame_factor // 2 + 1, num_frames=self.num_frames)  # rounds to at least one factor
        check_above_zero(True, fps=self.fps, base_interval=self.base_interval)
        check_between(0, 1, uniform_share=self.uniform_share)
        given = [f"{k}={getattr(self, k)}" for k in ("fps", "num_frames", "indices") if getattr(self, k) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} contradict each other: set one of fps, num_frames and indices.")
        if self.indices is None and self.sampling == "uniform" and self.num_frames is None:
            raise ValueError("sampling='uniform' requires num_frames; for a rate use sampling='fps' with fps.")
        if self.sampling in ("duration", "all") and (self.fps is not None or self.num_frames is not None):
            problem = f"sampling={self.sampling!r} ignores fps={self.fps} and num_frames={self.num_frames}"
            raise ValueError(f"{problem}: remove them, or use sampling='fps'.")
        if not 0 <= (self.video_start or 0) <= (math.inf if self.video_end is None else self.video_end):
            raise ValueError(
                f"video_start={self.video_start} and video_end={self.video_end} are not a range: use seconds after the "
                "first frame, at least 0, with the start before the end."
            )


def choose(
    timestamps: np.ndarray,
    options: SamplingOptions,
    keyframes: Sequence[int] = (),
    scores: Tensor | Sequence[float] | None = None,
    rate: float | None = None,
    duration: float | None = None,
) -> list[int]:
    """Returns the indices of the frames to decode, in order, counted from the start of the video.

    Args:
        timestamps: float64 (N,), seconds of every frame of the video, ascending, starting anywhere.
        options: the sampling strategy.
        keyframes: indices of the keyframes; required by ``sampling='keyframes'``.
        scores: importance of each frame of ``candidate_frames``, at least 0, such as ``change_scores``; required by
            ``sampling='adaptive'``.
        rate: frames per second of the whole video as stated by the container; ``frame_rate`` of the timestamps if None.
            Do not pass a rate computed from timestamps: it lacks the rounding that makes counts exact.
        duration: seconds from the first frame to the end of the last; its display time is the mean interval if None.

    Raises:
        ValueError: options that do not fit this video: an empty range, too few frames, an index out of range.
        VideoError: no timestamps, or timestamps that are not ascending finite numbers.
    """
    times = checked_times(timestamps)
    if (scores is None) == (options.sampling == "adaptive" and options.indices is None):
        problem = f"sampling={options.sampling!r} {'requires' if scores is None else 'ignores'} scores"
        raise ValueError(f"{problem}: pass one per frame of candidate_frames, with sampling='adaptive' only.")
    first, last = _range(times, options, duration)
    inside = sorted({int(k) for k in keyframes if first <= k <= last})
    natural = len(inside) if options.sampling == "keyframes" else None
    count = partial(_count, times, first, last, options, rate, duration, natural)
    if options.indices is not None:
        chosen = list(options.indices)
        outside = [i for i in chosen if not first <= i <= last]
        if outside or not chosen:
            raise ValueError(
                f"indices={chosen[:8]} contain the frames {outside[:8]}, but the video, or its range from video_start "
                f"to video_end, has the frames {first} to {last}: choose at least one of these."
            )
    elif options.sampling == "all":
        if last - first + 1 > options.max_frames:
            problem = f"sampling='all' would take {last - first + 1} frames, above max_frames={options.max_frames}"
            raise ValueError(f"{problem}: raise max_frames, choose a range, or use sampling='fps'.")
        chosen = list(range(first, last + 1))
    elif options.sampling == "duration":
        limits = (options.min_frames, options.max_frames, options.frame_factor)
        seconds = _seconds(times, (first, last), options, duration)
        chosen = [first + i for i in every_interval(times[first : last + 1], options.base_interval, *limits, *seconds)]
    elif options.sampling == "keyframes":
        chosen = prefer_keyframes(inside, first, last, count())
    elif scores is not None:
        chosen = by_scores(scores, candidate_frames(times, options, rate, duration), count(), options.uniform_share)
    elif options.sampling == "progressive":
        raise ValueError("sampling='progressive' compares decoded frames: use FrameReader.sample, or process_video.")
    elif options.sampling == "bursts":
        chosen = bursts(first, last, count(), options.burst_frames)
    elif options.sampling not in STRATEGIES:
        inside = [key - first for key in inside]
        chosen = [first + i for i in registered()[options.sampling](times[first : last + 1], count(), inside)]
    elif options.by_time:
        even = even_times(times[first : last + 1], count(), *_seconds(times, (first, last), options, duration))
        chosen = [first + i for i in on_screen(times[first : last + 1], even)]
    else:
        chosen = spread(first, last, count(), options.spacing)
    wanted = _rounded_count(options) if options.num_frames is not None else len(chosen)
    wanted = math.ceil(wanted / options.frame_factor) * options.frame_factor
    return chosen + [chosen[-1]] * (wanted - len(chosen))


def candidate_frames(
    timestamps: np.ndarray, options: SamplingOptions, rate: float | None = None, duration: float | None = None
) -> list[int]:
    """Returns the frames that ``sampling='adaptive'`` scores: ``candidates_per_frame`` per frame to take, spread evenly
    over the range. Raises as :func:`choose`."""
    times = checked_times(timestamps)
    first, last = _range(times, options, duration)
    count = _count(times, first, last, options, rate, duration) * options.candidates_per_frame
    return spread(first, last, min(count, last - first + 1), "linspace")


def seconds_per_frame(
    timestamps: np.ndarray,
    indices: Sequence[int],
    options: SamplingOptions,
    rate: float | None = None,
    duration: float | None = None,
) -> float:
    """Returns the seconds of video that one sampled frame stands for: those of the video, or of its range, divided by
    the distinct frames taken. Its inverse is ``sample_fps`` of qwen-vl-utils and ``sampled_fps`` of transformers; the
    spacing of inclusive indices is wider. For explicit ``indices``, the mean spacing of the frames.

    Args:
        timestamps: float64 (N,), seconds of every frame of the video.
        indices: the frames taken.
        options: for the range.
        rate: frames per second; that of the timestamps if None, 2 if they are all the same.
        duration: see ``choose``.
    """
    taken = sorted(set(indices))
    if options.indices is not None and len(taken) > 1:
        return float(timestamps[taken[-1]] - timestamps[taken[0]]) / (len(taken) - 1)
    first, last = _range(timestamps, options, duration)
    if timestamps[-1] > timestamps[0]:
        rate = frame_rate(timestamps, duration)
    return (last - first + 1) / (rate or DEFAULT_FPS) / len(taken)


def smart_num_frames(
    total: int, rate: float, fps: float = DEFAULT_FPS, min_frames: int = 4, max_frames: int = 768, frame_factor: int = 2
) -> int:
    """Returns the number of frames that samples ``total`` frames at ``rate`` frames per second down to ``fps``: a
    multiple of ``frame_factor``, rounded down; ``total`` if that is less than one factor.

    Equals ``smart_nframes`` of qwen-vl-utils and, with ``frame_factor=1``, Qwen3-VL in transformers.
    """
    return limited_count(total / rate * fps, total, min_frames, max_frames, frame_factor)


def spread(first: int, last: int, num_frames: int, spacing: str = "inclusive") -> list[int]:
    """Returns ``num_frames`` ascending indices from ``first`` to ``last``; ``spacing`` as in ``SamplingOptions``."""
    total = last - first + 1
    if spacing == "inclusive":
        return torch.linspace(first, last, num_frames).round().long().clamp_(first, last).tolist()
    if spacing == "linspace":
        return np.linspace(first, last, num_frames).round().astype(int).tolist()
    if spacing == "arange":  # rounding may add one index
        return [first + i for i in torch.arange(0, total, total / num_frames).int()[:num_frames].tolist()]
    if spacing == "centres":
        return [first + i for i in torch.arange(total / num_frames / 2, total, total / num_frames).int().tolist()]
    return [first + i * total // num_frames for i in range(num_frames)]


def nearest(values: np.ndarray, targets: np.ndarray) -> list[int]:
    """Returns the index of the closest of ascending values for each target, the earlier in a tie."""
    after = np.searchsorted(values, targets).clip(1, max(len(values) - 1, 1))
    before = after - 1
    late = np.abs(values[after.clip(max=len(values) - 1)] - targets) < np.abs(values[before] - targets) - 1e-9
    return np.where(late, after, before).tolist()


def prefer_keyframes(keyframes: Sequence[int], first: int, last: int, num_frames: int) -> list[int]:
    """Returns ``num_frames`` ascending frames from ``first`` to ``last`` (all, if there are fewer): keyframes, evenly
    thinned if there are more, else completed by repeatedly adding the frame farthest from those taken."""
    if len(keyframes) >= num_frames:
        return [keyframes[i] for i in spread(0, len(keyframes) - 1, num_frames, "linspace")]
    taken = list(keyframes) or [first]
    # mirror the outer gaps, so that their middle is the first or last frame
    edges = [2 * first - taken[0], *taken, 2 * last - taken[-1]]
    gaps = [(low - high, low, high) for low, high in itertools.pairwise(edges) if high - low > 1]
    heapq.heapify(gaps)
    while gaps and len(taken) < num_frames:
        _, low, high = heapq.heappop(gaps)  # widest gap first, then the earliest
        middle = (low + high) // 2
        taken.append(middle)
        for a, b in ((low, middle), (middle, high)):
            if first <= a and b <= last and b - a > 1:
                heapq.heappush(gaps, (a - b, a, b))
    return sorted(taken)


def by_scores(
    scores: Tensor | Sequence[float], candidates: Sequence[int], num_frames: int, uniform_share: float = 0.25
) -> list[int]:
    """Returns ``num_frames`` distinct candidates at equal steps of the cumulative score.

    A score belongs to the step that leads to its candidate, so a scene cut receives frames on both sides. The first
    candidate is always taken, and also the last if there are two frames or more.

    Args:
        scores: (N,), at least 0.
        candidates: N frame indices, ascending.
        num_frames: 1 to N.
        uniform_share: share of the total that is spread evenly over the steps, so that static parts keep some frames.

    Raises:
        ValueError: negative or non-finite scores, a number of scores other than N, or ``num_frames`` out of range.
    """
    values, total = torch.as_tensor(scores, dtype=torch.float64).cpu(), len(candidates)
    if values.shape != (total,) or not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        found = f"scores of shape {tuple(values.shape)} for {total} candidate frames"
        raise ValueError(f"{found}: pass one finite number of at least 0 per frame.")
    if not 1 <= num_frames <= total:
        raise ValueError(f"num_frames={num_frames} of {total} candidate frames: take at least one and at most all.")
    steps = values[1:].numpy()
    even = np.full(total - 1, 1 / max(total - 1, 1))
    share = steps / steps.sum() if steps.sum() > 0 else even
    reached = np.concatenate([[0.0], np.cumsum((1 - uniform_share) * share + uniform_share * even)])
    picked = nearest(reached, np.linspace(0, reached[-1], num_frames))
    for k in range(1, num_frames):  # several steps within one jump: take the next candidates
        picked[k] = max(picked[k], picked[k - 1] + 1)
    picked[-1] = max(picked[-1], total - 1 if num_frames > 1 else 0)  # even if the last scores are 0
    return [candidates[min(i, total - num_frames + k)] for k, i in enumerate(picked)]


def change_scores(frames: Tensor) -> Tensor:
    """Returns the difference of each frame to the previous one: uint8 (N, 3, h, w) RGB to float32 (N,) in [0, 1].

    Mean absolute difference of luma and the two chroma channels (BT.601); 0 for the first frame. Frames about 160
    pixels wide suffice: larger ones measure noise. Raises ValueError for a wrong dtype or shape.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or frames.numel() == 0:
        raise ValueError(f"frames are {frames.dtype} of shape {tuple(frames.shape)}: pass uint8 (N, 3, h, w).")
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


def choose_clip(
    timestamps: np.ndarray, options: ClipSampling, rng: np.random.Generator | None = None, window: int = 0
) -> list[int]:
    """Returns the frame indices of a clip of ``options.num_frames`` frames, or of all windows of ``segments``.

    Args:
        timestamps: float64 (N,), seconds of every frame of the video, ascending.
        options: the sampling strategy.
        rng: draws the starts of ``random`` and ``segments``; seeded with 0 if None.
        window: index of the window of ``multi_clip``, 0 to ``num_clips`` - 1.

    Raises:
        ValueError: the video is shorter than the clip and ``pad`` is not set, or a value below 1.
    """
    total, num_frames, stride, pad = len(timestamps), options.num_frames, options.stride, options.pad
    if options.sampler == "uniform":
        return uniform(total, num_frames, pad)
    if options.sampler == "random":
        return random_window(total, num_frames, rng or np.random.default_rng(0), stride, pad)
    if options.sampler == "multi_clip":
        return windows(total, num_frames, options.num_clips, stride, pad)[window]
    if options.sampler == "segments":
        return segments(total, num_frames, options.num_clips, rng or np.random.default_rng(0), stride, pad)
    assert options.fps is not None
    return fixed_fps(timestamps.tolist(), num_frames, options.fps, pad=pad)


def uniform(total: int, num_frames: int, pad: bool = False) -> list[int]:
    """Returns ``num_frames`` indices spread evenly over the video, including the first and last frame; the middle frame
    for ``num_frames=1``. Raises as :func:`random_window` with ``stride=1``."""
    if _slack(total, num_frames, 1, pad) < 0:
        return _window(0, total, num_frames, 1)
    if num_frames == 1:
        return [total // 2]
    return [round(i * (total - 1) / (num_frames - 1)) for i in range(num_frames)]


def random_window(
    total: int, num_frames: int, rng: np.random.Generator, stride: int = 1, pad: bool = False
) -> list[int]:
    """Returns every ``stride``-th frame of a window with a start drawn from ``rng``.

    Raises:
        ValueError: the window of (num_frames - 1) · stride + 1 frames is longer than the video and ``pad`` is not set,
            or a value below 1.
    """
    slack = _slack(total, num_frames, stride, pad)
    start = int(rng.integers(slack + 1)) if slack >= 0 else 0
    return _window(start, total, num_frames, stride)


def windows(total: int, num_frames: int, num_clips: int, stride: int = 1, pad: bool = False) -> list[list[int]]:
    """Returns ``num_clips`` windows with starts spread evenly from the first possible to the last; the middle window
    for ``num_clips=1``. Raises as :func:`random_window`."""
    check_at_least(1, num_clips=num_clips)
    last = max(_slack(total, num_frames, stride, pad), 0)
    starts = [last // 2] if num_clips == 1 else [round(i * last / (num_clips - 1)) for i in range(num_clips)]
    return [_window(start, total, num_frames, stride) for start in starts]


def segments(
    total: int, num_frames: int, num_clips: int, rng: np.random.Generator, stride: int = 1, pad: bool = False
) -> list[int]:
    """Returns ``num_clips`` windows of ``num_frames`` frames, concatenated, as the probes of V-JEPA sample a video.

    The video is divided into ``num_clips`` parts of equal length. A window spreads its frames over num_frames · stride
    frames, from a start drawn from ``rng`` within its part. Where a part is not longer than this, windows overlap:
    they are spread evenly from the first frame to the last, and in videos shorter than one window the last frame is
    repeated.

    Raises:
        ValueError: the video is shorter than a window and ``pad`` is not set, or a value below 1.
    """
    check_at_least(1, num_clips=num_clips)
    _slack(total, num_frames, stride, pad)
    span, part = num_frames * stride, total // num_clips
    if part > span:
        starts = [i * part + int(rng.integers(part - span)) for i in range(num_clips)]
        # as published: both ends count, so that the step is stride · num_frames / (num_frames - 1)
        within = np.linspace(0, span, num=num_frames).clip(0, span - 1)
        return [int(start + offset) for start in starts for offset in within]
    last = min(span, total) - 1
    count = last // stride
    frames = [*np.linspace(0, last, num=count), *[last] * (num_frames - count)]
    within = np.clip(frames, 0, max(last - 1, 0)).astype(int)
    step = (total - span) // max(num_clips - 1, 1) if total > span else 0
    return [int(i * step + offset) for i in range(num_clips) for offset in within]


def fixed_fps(
    timestamps: Sequence[float], num_frames: int, fps: float, rng: np.random.Generator | None = None, pad: bool = False
) -> list[int]:
    """Returns the frames displayed at ``num_frames`` times 1 / ``fps`` seconds apart, also at a variable frame rate.

    Args:
        timestamps: seconds of every frame of the video, ascending.
        num_frames: frames to take.
        fps: frames per second of the clip; above the rate of the video, frames repeat.
        rng: draws the start; if None, the clip is centered in the video.
        pad: repeat the last frame if the video ends before the clip.

    Raises:
        ValueError: the clip is longer than the video and ``pad`` is not set, or a value out of range.
    """
    if fps <= 0 or num_frames < 1 or not timestamps:
        found = f"fps={fps} and num_frames={num_frames} on a video of {len(timestamps)} frames"
        raise ValueError(f"{found}: use fps > 0 and at least one frame.")
    slack = timestamps[-1] - timestamps[0] - (num_frames - 1) / fps
    if slack < -TOLERANCE and not pad:
        found = f"the {len(timestamps)} frames of the video span {timestamps[-1] - timestamps[0]:.3g} s"
        raise ValueError(
            f"num_frames={num_frames} at fps={fps} last {(num_frames - 1) / fps:.3g} s, but {found}: lower num_frames, "
            "raise fps, or set pad=true to repeat the last frame."
        )
    start = timestamps[0] + max(slack, 0.0) * (rng.random() if rng is not None else 0.5)
    return on_screen(np.asarray(timestamps), start + np.arange(num_frames) / fps)


def _slack(total: int, num_frames: int, stride: int, pad: bool) -> int:
    """Returns the frames of the video minus those that the window spans; negative only with ``pad``."""
    window = f"num_frames={num_frames} with stride={stride}"
    if min(total, num_frames, stride) < 1:
        raise ValueError(f"{window} of a video of {total} frames: each must be at least 1.")
    span = (num_frames - 1) * stride + 1
    if total < span and not pad:
        raise ValueError(
            f"{window} requires a video of {span} frames, but this one has {total}: lower num_frames or stride, or set "
            "pad=true to repeat the last frame."
        )
    return total - span


def _window(start: int, total: int, num_frames: int, stride: int) -> list[int]:
    """Returns every ``stride``-th frame from ``start``; the last frame of the video is repeated after its end."""
    return [min(start + i * stride, total - 1) for i in range(num_frames)]


def _range(times: np.ndarray, options: SamplingOptions, duration: float | None) -> tuple[int, int]:
    by_time = options.by_time or options.sampling == "duration"
    return time_range(times, options.video_start, options.video_end, duration, by_time)


def _seconds(
    times: np.ndarray, frames: tuple[int, int], options: SamplingOptions, duration: float | None
) -> tuple[float, float]:
    return seconds_on_screen(times, frames, options.video_start, options.video_end, duration)


def _count(
    times: np.ndarray,
    first: int,
    last: int,
    options: SamplingOptions,
    rate: float | None,
    duration: float | None,
    natural: int | None = None,
) -> int:
    """Returns the number of distinct frames to take; ``natural`` if neither a count nor a rate is set."""
    total = last - first + 1
    if options.num_frames is not None:
        wanted = _rounded_count(options)
        if wanted > max(total, options.frame_factor) and not options.pad_frames:
            raise ValueError(
                f"num_frames={options.num_frames} (in multiples of {options.frame_factor}: {wanted}) exceeds the "
                f"{total} frames of the video or its range: lower it, or set pad_frames=true to repeat the last frame."
            )
        return min(wanted, total)
    limits = (options.min_frames, options.max_frames, options.frame_factor)
    if total == 1:
        return 1
    if natural is not None and options.fps is None:
        # round up: all of them, if they fit
        return limited_count(natural + -natural % options.frame_factor, total, *limits)
    rate = rate or frame_rate(times, duration)
    if options.by_time:  # equal at a constant rate; rounded, since a sum of times is inexact
        start, end = _seconds(times, (first, last), options, duration)
        rate = total / max(round(end - start, 6), TOLERANCE)
    return smart_num_frames(total, rate, options.fps or DEFAULT_FPS, *limits)


def _rounded_count(options: SamplingOptions) -> int:
    return round((options.num_frames or 0) / options.frame_factor) * options.frame_factor
