"""Plan of a video from its packets, before decoding: frames, size, tokens and bytes, reduced to the budgets."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import psutil

from blueberry_video.video.budget import shrink
from blueberry_video.video.clip import check_decoded, is_list, shown_times
from blueberry_video.video.container import VideoInfo
from blueberry_video.video.errors import LimitError
from blueberry_video.video.formats import DTYPES
from blueberry_video.video.resize import video_size
from blueberry_video.video.sampling import spread
from blueberry_video.video.settings import VideoSettings
from blueberry_video.video.tokens import MemoryEstimate, TokenCount, count_tokens, fit, memory_estimate, validate

FIXED_SIZES = ("crop", "stretch")  # resize rules of models with one input size


@dataclass(frozen=True)
class Plan:
    """Frames, size, tokens and bytes of a processed video, known before decoding.

    Attributes:
        indices: indices of the frames to take, ascending; the last one repeats if the video is too short.
        height, width: size of the resized frames.
        tokens: tokens of the video in the model.
        memory: bytes in the memory of the model, for fp32, bf16, int8 and int4.
        frame_bytes: bytes of the resized frames and of the formatted output.
        degraded: descriptions of the reductions that meet a budget.
        damage: what the file lacks according to its headers; empty for a whole file.
    """

    indices: tuple[int, ...]
    height: int
    width: int
    tokens: TokenCount
    memory: dict[str, MemoryEstimate]
    frame_bytes: int
    degraded: tuple[str, ...] = ()
    damage: str = ""


def make_plan(info: VideoInfo, indices: Sequence[int], settings: VideoSettings) -> Plan:
    """Returns the plan of the sampled frames, reduced to the budgets of ``settings.run``.

    Raises:
        LimitError: a limit is exceeded and nothing can be reduced.
        ValueError: a size that the resize rule does not accept.
    """
    check_limits(info, settings)
    resizing, run, tokens = settings.resize, settings.run, settings.tokens
    aspect = info.picture.pixel_aspect
    size = video_size(info.height, info.width, len(indices), resizing, is_list(info), aspect)
    plan = _planned(info, indices, size, settings)
    memory = run.max_memory_bytes
    if memory is not None:
        why = f"max_memory_bytes={memory}"
        plan = _reduced(plan, info, settings, why, lambda count, size: _frame_bytes(count, size, settings) <= memory)
    if run.on_overflow == "fit":
        why = f"context_length={tokens.context_length}"
        plan = _reduced(plan, info, settings, why, lambda count, size: fit(count, *size, tokens).fits)
    if run.on_overflow == "error":
        validate(len(plan.indices), plan.height, plan.width, tokens)
    check_decoded(info, plan.indices, settings.source.max_decoded_pixels)
    available = psutil.virtual_memory().available
    if plan.frame_bytes > available:
        raise LimitError(
            f"{len(plan.indices)} frames of {info.name} at {plan.width}x{plan.height} pixels require "
            f"{plan.frame_bytes} bytes, but {available} are free: take fewer or smaller ones, or set max_memory_bytes."
        )
    return plan


def faster_plans(plan: Plan, info: VideoInfo, settings: VideoSettings) -> Iterator[Plan]:
    """Yields plans that decode faster: half the frames, repeatedly, and finally the keyframes before them."""
    options, size = settings.sampling, (plan.height, plan.width)
    why = f"max_seconds={settings.run.max_seconds:g}"
    while True:
        before = plan.indices
        count = len(before) // 2 // options.frame_factor * options.frame_factor
        if count < max(options.min_frames, options.frame_factor):
            break
        step = f"{len(before)} → {count} frames ({why})"
        plan = _planned(info, _thinned(before, count), size, settings, (*plan.degraded, step))
        yield plan
    keys = info.keyframes.tolist() or [0]
    nearest = [keys[max(0, bisect_right(keys, index) - 1)] for index in before]
    step = f"{len(nearest)} frames → the keyframes before them ({why})"
    yield _planned(info, nearest, size, settings, (*plan.degraded, step))


def check_limits(info: VideoInfo, settings: VideoSettings) -> None:
    """Raises LimitError if a video is longer than ``max_duration``."""
    limit = settings.source.max_duration
    if info.duration > limit:
        raise LimitError(
            f"{info.name} lasts {info.duration:.0f} s, above max_duration={limit:g}: cut it or raise that."
        )


def _planned(
    info: VideoInfo,
    indices: Sequence[int],
    size: tuple[int, int],
    settings: VideoSettings,
    degraded: Sequence[str] = (),
) -> Plan:
    count = len(indices)
    times = shown_times(info, indices, settings.sampling).tolist()
    return Plan(
        indices=tuple(indices),
        height=size[0],
        width=size[1],
        tokens=count_tokens(count, *size, settings.tokens, times),
        memory=memory_estimate(count, *size, settings.tokens),
        frame_bytes=_frame_bytes(count, size, settings),
        degraded=tuple(degraded),
        damage=info.damage,
    )


def _reduced(
    plan: Plan, info: VideoInfo, settings: VideoSettings, why: str, fits: Callable[[int, tuple[int, int]], bool]
) -> Plan:
    count, size, options = len(plan.indices), (plan.height, plan.width), settings.sampling
    if fits(count, size):
        return plan
    step = None if settings.resize.rule in FIXED_SIZES else settings.tokens.size_step
    found = shrink(count, size, fits, options.frame_factor, options.min_frames, step)
    if found is None:
        raise LimitError(f"{options.frame_factor} frames of {info.name}, the fewest, exceed {why}: raise it.")
    fewer, smaller = found
    degraded = list(plan.degraded)
    if fewer != count:
        degraded.append(f"{count} → {fewer} frames ({why})")
    if smaller != size:
        degraded.append(f"{size[0]}x{size[1]} → {smaller[0]}x{smaller[1]} pixels ({why})")
    return _planned(info, _thinned(plan.indices, fewer), smaller, settings, degraded)


def _thinned(indices: Sequence[int], count: int) -> list[int]:
    return [indices[i] for i in spread(0, len(indices) - 1, count)]


def _frame_bytes(num_frames: int, size: tuple[int, int], settings: VideoSettings) -> int:
    """Returns the bytes of the uint8 frames, plus those of the formatted output if it is a separate tensor."""
    values = 3 * num_frames * size[0] * size[1]
    options = settings.format
    same = options.format == "tensor" and (options.dtype, options.layout, options.channels) == ("uint8", "tchw", "rgb")
    return values * (1 if same else 1 + DTYPES[options.dtype].itemsize)
