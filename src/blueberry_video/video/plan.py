"""What a video will be, from its packets alone: frames, size, tokens, bytes; and what is given up to meet a budget."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import psutil

from blueberry_video.video.budget import shrink
from blueberry_video.video.container import VideoInfo
from blueberry_video.video.errors import LimitError
from blueberry_video.video.formats import DTYPES
from blueberry_video.video.resize import video_size
from blueberry_video.video.sampling import spread
from blueberry_video.video.settings import VideoSettings
from blueberry_video.video.tokens import MemoryEstimate, TokenCount, count_tokens, fit, memory_estimate, validate

FIXED_SIZES = ("crop", "stretch")  # resize rules of models that take one size only


@dataclass(frozen=True)
class Plan:
    """What a video will be, known before anything is decoded.

    Attributes:
        indices: numbers of the frames to take, ascending; the last one repeated where a video is too short.
        height, width: of the resized frames.
        tokens: that a model makes of it.
        memory: bytes in a model's memory, for fp32, bf16, int8 and int4.
        frame_bytes: bytes of the resized frames and of what is formatted from them.
        degraded: what was reduced to meet a budget, in words.
    """

    indices: tuple[int, ...]
    height: int
    width: int
    tokens: TokenCount
    memory: dict[str, MemoryEstimate]
    frame_bytes: int
    degraded: tuple[str, ...] = ()


def make_plan(info: VideoInfo, indices: Sequence[int], settings: VideoSettings) -> Plan:
    """The chosen frames at the size that they get, reduced to the budgets of ``settings.run``.

    Raises:
        LimitError: more than a limit allows, and nothing that could be reduced.
        ValueError: a size that the rule refuses.
    """
    check_limits(info, settings)
    resizing, run, tokens = settings.resize, settings.run, settings.tokens
    plan = _planned(info, indices, video_size(info.height, info.width, len(indices), resizing), settings)
    memory = run.max_memory_bytes
    if memory is not None:
        plan = _reduced(
            plan,
            info,
            settings,
            lambda count, size: _frame_bytes(count, size, settings) <= memory,
            f"max_memory_bytes={memory}",
        )
    if run.on_overflow == "fit":
        plan = _reduced(
            plan,
            info,
            settings,
            lambda count, size: fit(count, *size, tokens).fits,
            f"context_length={tokens.context_length}",
        )
    if run.on_overflow == "error":
        validate(len(plan.indices), plan.height, plan.width, tokens)
    check_decoded(info, plan.indices, settings)
    available = psutil.virtual_memory().available
    if plan.frame_bytes > available:
        raise LimitError(
            f"{len(plan.indices)} frames of {info.name} at {plan.width}x{plan.height} pixels, with what is formatted "
            f"from them, take {plan.frame_bytes} bytes, and {available} are free: take fewer frames or pixels, or set "
            "max_memory_bytes, which does."
        )
    return plan


def faster_plans(plan: Plan, info: VideoInfo, settings: VideoSettings) -> Iterator[Plan]:
    """Plans that take less time to decode: half the frames, and so on; at last the keyframes before them."""
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
    """Refuses what is too long before it is decoded.

    Raises:
        LimitError: longer than ``max_duration``.
    """
    if info.duration > settings.source.max_duration:
        raise LimitError(
            f"{info.name} lasts {info.duration:.0f} s, longer than max_duration={settings.source.max_duration:g}: cut "
            "it, or raise the limit."
        )


def check_decoded(info: VideoInfo, indices: Sequence[int], settings: VideoSettings) -> None:
    """Refuses to decode too many pixels.

    Raises:
        LimitError: more than ``max_decoded_pixels``.
    """
    count = len(set(indices))
    pixels = count * info.height * info.width
    if pixels > settings.source.max_decoded_pixels:
        raise LimitError(
            f"{count} frames of {info.name} at {info.width}x{info.height} are {pixels} pixels to decode, above "
            f"max_decoded_pixels={settings.source.max_decoded_pixels}: take fewer frames, or raise it."
        )


def _planned(
    info: VideoInfo,
    indices: Sequence[int],
    size: tuple[int, int],
    settings: VideoSettings,
    degraded: tuple[str, ...] = (),
) -> Plan:
    count = len(indices)
    times = (info.timestamps[list(indices)] - info.timestamps[0]).tolist()
    return Plan(
        indices=tuple(indices),
        height=size[0],
        width=size[1],
        tokens=count_tokens(count, *size, settings.tokens, times),
        memory=memory_estimate(count, *size, settings.tokens),
        frame_bytes=_frame_bytes(count, size, settings),
        degraded=degraded,
    )


def _reduced(
    plan: Plan, info: VideoInfo, settings: VideoSettings, fits: Callable[[int, tuple[int, int]], bool], why: str
) -> Plan:
    count, size, options = len(plan.indices), (plan.height, plan.width), settings.sampling
    if fits(count, size):
        return plan
    step = None if settings.resize.rule in FIXED_SIZES else settings.tokens.size_step
    found = shrink(count, size, fits, options.frame_factor, options.min_frames, step)
    if found is None:
        raise LimitError(f"Not even {options.frame_factor} frames of {info.name} fit {why}: raise it.")
    fewer, smaller = found
    degraded = list(plan.degraded)
    if fewer != count:
        degraded.append(f"{count} → {fewer} frames ({why})")
    if smaller != size:
        degraded.append(f"{size[0]}x{size[1]} → {smaller[0]}x{smaller[1]} pixels ({why})")
    return _planned(info, _thinned(plan.indices, fewer), smaller, settings, tuple(degraded))


def _thinned(indices: Sequence[int], count: int) -> list[int]:
    return [indices[place] for place in spread(0, len(indices) - 1, count)]


def _frame_bytes(num_frames: int, size: tuple[int, int], settings: VideoSettings) -> int:
    """Of the uint8 frames, and of what is made of them where that is another tensor."""
    values = 3 * num_frames * size[0] * size[1]
    options = settings.format
    same = options.format == "tensor" and (options.dtype, options.layout, options.channels) == ("uint8", "tchw", "rgb")
    return values * (1 if same else 1 + DTYPES[options.dtype].itemsize)
