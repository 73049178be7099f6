"""Frame sizes under a model's rules and pixel budgets, and resizing of uint8 frames.

Sizes are pure functions of numbers; ``video_size`` implements seven rules. The ``smart`` rule is that of qwen-vl-utils
0.0.14 (``vision_process.py``), with its budgets applied in the same order, except that a side is never rounded down to
0: it is at least one factor.

Pixels: the exact mode equals torchvision's float bicubic interpolation with antialias, clamped and rounded (Keys'
cubic, a = -0.5, as in PyTorch and Pillow). Neighboring outputs read nearly the same inputs, so 16 to 32 outputs are one
dense block of weights times the rows or columns that they read: 3 to 5 times faster on a CPU than ``F.interpolate``.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.video.errors import LimitError
from blueberry_video.video.ranges import check_at_least, check_choice

RULES = ("smart", "fill", "crop", "cover", "stretch", "fit", "none")
RESAMPLES = ("exact", "fast")
INTERPOLATIONS = ("bicubic", "bilinear")
PIXEL_BUDGETS = ("frame", "video")
Size = tuple[int, int]  # (height, width)
MIN_TOKENS, MAX_TOKENS, CONTEXT_TOKENS = 128, 768, 128_000  # per frame, per frame, per video (of which 90 % is used)
IMAGE_MIN_TOKENS, IMAGE_MAX_TOKENS = 4, 16_384  # limits of an explicit size
MAX_PIXEL_ASPECT = 100
BUFFER_BYTES = 32 * 2**20  # buffers of the exact mode, for clips of any size


@dataclass(frozen=True)
class ResizeOptions:
    """Size and resampling of the frames.

    Args:
        rule: ``smart``: close to the original size, aspect ratio nearly kept, sides multiples of ``size_factor``
            (Qwen); ``fill``: as large as ``max_pixels`` allows, aspect ratio nearly kept, sides multiples of
            ``size_factor`` (Gemma); ``crop``: scaled until the frame covers ``image_size``, then center-cropped;
            ``cover``: the same without the crop; ``stretch``: resized to ``image_size``; ``fit``: scaled down to fit
            ``max_long_side`` and ``max_short_side`` (GPT-4o: 2048 and 768); ``none``: the original size.
        size_factor: pixels, patch size times merge size: 28 for Qwen2.5-VL, 32 for Qwen3-VL.
        list_factor: frames of a list are first rounded to multiples of list_factor · size_factor within the limits of a
            single image, then to those of the video, as qwen-vl-utils does with 2; 1: sized as a file.
        temporal_factor: frames per token; at least 1.
        min_pixels, max_pixels: pixels of a frame; null is 128 and 768 · size_factor². ``fill`` requires max_pixels.
        total_pixels: pixels of all frames divided by ``temporal_factor``, shared evenly; null is
            0.9 · 128000 · size_factor².
        pixel_budget: ``frame``: budgets as above; ``video``: min_pixels and max_pixels count T · H · W of the whole
            video and total_pixels is ignored (Qwen3-VL in transformers).
        resized_height, resized_width: pixels, both: an explicit size that ignores the budgets, rounded to size_factor.
        image_size: pixels, for ``crop``, ``cover`` and ``stretch``: one number for a square, or (height, width).
        max_long_side, max_short_side: pixels, for ``fit``; null is no limit.
        resample: ``exact``: float arithmetic, rounded once; ``fast``: PyTorch's fixed-point kernels, a few levels off.
        interpolation: ``bicubic`` or ``bilinear``.
        max_aspect: ratio of the longer to the shorter side above which ``smart`` raises; at least 1.
        antialias: widen the kernel when downscaling; without, each output pixel mixes its nearest 2 x 2 (bilinear) or
            4 x 4 pixels, as OpenCV and ``torch.nn.functional.interpolate`` do.
        square_pixels: take the display size of video with pixels that are not square, see ``display_size``, as its
            original size, so that shapes have their displayed proportions. Frames are resized once.

    Raises:
        ValueError: a value out of range, or a missing value that the rule requires.
    """

    rule: str = "smart"
    size_factor: int = 28
    list_factor: int = 1
    temporal_factor: int = 2
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    pixel_budget: str = "frame"
    resized_height: int | None = None
    resized_width: int | None = None
    image_size: int | tuple[int, int] | None = None
    max_long_side: int | None = None
    max_short_side: int | None = None
    resample: str = "exact"
    interpolation: str = "bicubic"
    max_aspect: float = 200.0
    antialias: bool = True
    square_pixels: bool = False

    def __post_init__(self) -> None:
        for key, allowed in (("rule", RULES), ("pixel_budget", PIXEL_BUDGETS)):
            check_choice(key, getattr(self, key), allowed)
        _check_resampling(self.resample, self.interpolation)
        if not isinstance(self.antialias, bool):
            raise ValueError(f"antialias={self.antialias!r} must be true or false.")
        numbers = {key: value for key, value in vars(self).items() if type(value) in (int, float)}
        check_at_least(1, **numbers)
        if self.image_size is not None:
            object.__setattr__(self, "image_size", _pair(self.image_size))
        if (self.resized_height is None) != (self.resized_width is None):
            given = f"resized_height={self.resized_height} and resized_width={self.resized_width}"
            raise ValueError(f"{given}: set both for an explicit size, or neither for a size within the budgets.")
        if self.rule in ("crop", "cover", "stretch") and self.image_size is None:
            raise ValueError(f"rule={self.rule!r} requires image_size: one number of pixels, or [height, width].")
        if self.rule == "fill" and self.max_pixels is None:
            raise ValueError("rule='fill' requires max_pixels: the most pixels of a frame.")


def smart_resize(
    height: int, width: int, factor: int, min_pixels: float, max_pixels: float, max_aspect: float = 200.0
) -> tuple[int, int]:
    """Returns (height, width) in multiples of ``factor`` within the budgets, with the aspect ratio nearly kept.

    A side is at least ``factor``. The result is outside the budgets only for that reason, or where the budgets are less
    than one factor per side apart.

    Raises:
        LimitError: an aspect ratio above ``max_aspect``.
        ValueError: ``min_pixels`` > ``max_pixels``.
    """
    rounded = (max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor))
    pixels = rounded[0] * rounded[1]
    return _within_budgets((height, width), 1, rounded, pixels, factor, (min_pixels, max_pixels), max_aspect)


def smart_resize_volume(
    height: int,
    width: int,
    num_frames: int,
    factor: int,
    min_pixels: float,
    max_pixels: float,
    temporal_factor: int = 2,
    max_aspect: float = 200.0,
) -> tuple[int, int]:
    """:func:`smart_resize` with budgets for T · H · W of the whole video, as Qwen3-VL in transformers 5."""
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    rounded = (round(height / factor) * factor, round(width / factor) * factor)
    volume = round(num_frames / temporal_factor) * temporal_factor * rounded[0] * rounded[1]
    return _within_budgets((height, width), num_frames, rounded, volume, factor, (min_pixels, max_pixels), max_aspect)


def fill(height: int, width: int, factor: int, max_pixels: int) -> tuple[int, int]:
    """Returns the largest (height, width) in multiples of ``factor`` within ``max_pixels``, with the aspect ratio kept
    up to rounding down, as Gemma 4 in transformers 5.

    Raises:
        ValueError: one factor by one factor exceeds ``max_pixels``.
    """
    scale = math.sqrt(max_pixels / (height * width))
    new_height, new_width = (math.floor(scale * side / factor) * factor for side in (height, width))
    longest = max_pixels // factor**2 * factor
    if new_height == 0 == new_width:
        raise ValueError(f"max_pixels={max_pixels} is less than one square of size_factor={factor}: raise max_pixels.")
    if new_height == 0:
        return factor, min(width // height * factor, longest)
    if new_width == 0:
        return min(height // width * factor, longest), factor
    return new_height, new_width


def display_size(height: int, width: int, pixel_aspect: tuple[int, int]) -> tuple[int, int]:
    """Returns (height, width) with square pixels: the same height, and width · aspect rounded down, as FFmpeg's
    ``scale=iw*sar:ih``.

    Args:
        height, width: pixels of a frame after rotation.
        pixel_aspect: (width, height) of a pixel.

    Raises:
        LimitError: a pixel more than ``MAX_PIXEL_ASPECT`` times longer than it is wide, or the reverse.
    """
    ratio = pixel_aspect[0] / pixel_aspect[1]
    if not 1 / MAX_PIXEL_ASPECT <= ratio <= MAX_PIXEL_ASPECT:
        found = f"Frames have a pixel aspect ratio of {pixel_aspect[0]}:{pixel_aspect[1]}"
        raise LimitError(f"{found}, outside 1:{MAX_PIXEL_ASPECT} to {MAX_PIXEL_ASPECT}:1: set square_pixels=false.")
    return height, max(1, int(width * ratio))


def video_size(
    height: int,
    width: int,
    num_frames: int,
    options: ResizeOptions,
    is_list: bool = False,
    pixel_aspect: tuple[int, int] = (1, 1),
) -> tuple[int, int]:
    """Returns the (height, width) to which ``num_frames`` frames of a video, or of a list, are resized.

    Raises:
        ValueError: a size or count below 1, and what ``smart_resize``, ``fill`` and ``display_size`` raise.
    """
    if min(height, width, num_frames) < 1:
        raise ValueError(f"num_frames={num_frames} of {width}x{height} pixels: each must be at least 1.")
    if options.square_pixels:
        height, width = display_size(height, width, pixel_aspect)
    factor = options.size_factor
    if options.resized_height is not None and options.resized_width is not None:
        limits = (IMAGE_MIN_TOKENS * factor**2, IMAGE_MAX_TOKENS * factor**2)
        return smart_resize(options.resized_height, options.resized_width, factor, *limits, options.max_aspect)
    if options.rule == "smart":
        if is_list and options.list_factor > 1:
            first = factor * options.list_factor
            least, most = IMAGE_MIN_TOKENS * first**2, IMAGE_MAX_TOKENS * first**2
            limits = (options.min_pixels or least, options.max_pixels or most)
            height, width = smart_resize(height, width, first, *limits, options.max_aspect)
        return _smart_size(height, width, num_frames, options)
    if options.rule == "fill" and options.max_pixels is not None:
        return fill(height, width, factor, options.max_pixels)
    if options.rule == "fit":
        longer = (options.max_long_side or math.inf) / max(height, width)
        scale = min(1.0, longer, (options.max_short_side or math.inf) / min(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))
    if options.image_size is not None and options.rule in ("crop", "stretch"):
        return _pair(options.image_size)
    if options.image_size is not None and options.rule == "cover":
        return covering_size(height, width, _pair(options.image_size))
    return height, width


def resize_video(frames: Tensor, options: ResizeOptions) -> Tensor:
    """Resizes uint8 (T, 3, H, W) to uint8 (T, 3, *video_size(H, W, T, options)); raises as both."""
    _check_frames(frames)
    return resize_to(frames, video_size(frames.shape[2], frames.shape[3], frames.shape[0], options), options)


def resize_to(
    frames: Tensor, size: tuple[int, int], options: ResizeOptions, pixel_aspect: tuple[int, int] = (1, 1)
) -> Tensor:
    """Resizes uint8 (T, 3, H, W) to a given size, cropping where the rule is ``crop``; raises as :func:`resize`."""
    if options.rule != "crop" or options.resized_height is not None:
        return resize(frames, size, options.resample, options.interpolation, options.antialias)
    aspect = pixel_aspect if options.square_pixels else (1, 1)
    return crop(frames, size, options.resample, options.interpolation, options.antialias, aspect)


def crop(
    frames: Tensor,
    size: tuple[int, int],
    resample: str = "exact",
    interpolation: str = "bicubic",
    antialias: bool = True,
    pixel_aspect: tuple[int, int] = (1, 1),
) -> Tensor:
    """Scales uint8 (T, 3, H, W) until ``size`` is covered and crops the center; raises as :func:`resize`."""
    _check_frames(frames)
    covering = covering_size(*display_size(frames.shape[2], frames.shape[3], pixel_aspect), size)
    return window(resize(frames, covering, resample, interpolation, antialias), size)


def covering_size(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Returns the smallest (height, width) of the same aspect ratio, up to rounding, that covers ``size``."""
    scale = max(size[0] / height, size[1] / width)
    return max(round(height * scale), size[0]), max(round(width * scale), size[1])


def window(frames: Tensor, size: tuple[int, int], position: int = 1) -> Tensor:
    """Cuts ``size`` out of the start (``position`` 0), the center (1) or the end (2) of each side."""
    top, left = ((side - least) * position // 2 for side, least in zip(frames.shape[2:], size))
    return frames[:, :, top : top + size[0], left : left + size[1]].contiguous()


def resize(
    frames: Tensor,
    size: tuple[int, int],
    resample: str = "exact",
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> Tensor:
    """Resizes uint8 (T, 3, H, W) to uint8 (T, 3, *size); returns the input if the size is the same.

    Channels-last frames, the layout of decoders, are read without a copy and stay channels-last in the fast mode. On a
    GPU both modes compute in float on the GPU.

    Args:
        frames: uint8 (T, C, H, W), T at least 1.
        size: (height, width) in pixels.
        resample: ``exact``: float interpolation, off by one level in about 2 of 100,000 pixels of noise; ``fast``:
            PyTorch's uint8 kernels, up to about 20 levels off on noise, 3 to 15 times faster than float interpolation.
        interpolation: ``bicubic`` or ``bilinear``.
        antialias: widen the kernel when downscaling.

    Raises:
        ValueError: no frames, a wrong dtype or shape, or an argument out of range.
    """
    _check_frames(frames)
    _check_resampling(resample, interpolation)
    size = _pair(size)
    if tuple(frames.shape[2:]) == size:
        return frames
    on_cpu = frames.device.type == "cpu"
    if on_cpu and resample == "fast" and size[1] > 1:  # at width 1 the kernel of PyTorch 2.13 crashes or is wrong
        return F.interpolate(frames, size, mode=interpolation, antialias=antialias)
    if not on_cpu or not antialias:
        chunk = max(1, 8 * BUFFER_BYTES // (4 * frames[0].numel()))  # a float copy of 768 frames of 1080p is 19 GB
        return torch.cat([_interpolated(part, size, interpolation, antialias) for part in frames.split(chunk)])
    return _by_products(frames, size, interpolation)


def _interpolated(frames: Tensor, size: tuple[int, int], interpolation: str, antialias: bool) -> Tensor:
    resized = F.interpolate(frames.float(), size, mode=interpolation, antialias=antialias)
    return resized.clamp_(0, 255).round_().to(torch.uint8)


class _Block(NamedTuple):
    """Block of the resampling matrix of one side: outputs ``start`` to ``stop`` are ``weights`` times the inputs
    ``first`` to ``last``."""

    start: int
    stop: int
    first: int
    last: int
    weights: Tensor


def _by_products(frames: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resizes in the exact mode: rows first, then columns, one band of rows of one frame at a time."""
    num_frames, channels, height, width = frames.shape
    # measured block sizes: larger blocks hold more zeros, smaller ones need more calls
    rows, columns = _blocks(height, size[0], interpolation, 16), _blocks(width, size[1], interpolation, 32)
    interleaved = channels > 1 and frames.stride(1) == 1
    source = frames.permute(0, 2, 3, 1) if interleaved else frames.permute(0, 2, 1, 3)  # (T, H, W, C) or (T, H, C, W)
    line = channels * width
    block_bytes = 4 * max(
        (block.last - block.first) * line + (block.stop - block.start) * (2 * line + channels * size[1])
        for block in rows
    )
    per_band = max(1, BUFFER_BYTES // block_bytes)
    bands = [rows[i : i + per_band] for i in range(0, len(rows), per_band)]
    tall_in = max(band[-1].last - band[0].first for band in bands)
    tall_out = max(band[-1].stop - band[0].start for band in bands)
    pixels = torch.empty(tall_in, line)
    mixed = torch.empty(tall_out, line)
    planar = torch.empty(tall_out, line) if interleaved else mixed
    done = torch.empty(tall_out * channels, size[1])
    resized = torch.empty(num_frames, channels, *size, dtype=torch.uint8)
    for band in bands:
        first, last, start, stop = band[0].first, band[-1].last, band[0].start, band[-1].stop
        tall = stop - start
        lines = planar[:tall].view(tall * channels, width)  # (rows C, W)
        result = done[: tall * channels]
        for index in range(num_frames):
            needed = source[index, first:last]
            pixels[: last - first].view(needed.shape).copy_(needed)
            for block in band:
                torch.mm(
                    block.weights,
                    pixels[block.first - first : block.last - first],
                    out=mixed[block.start - start : block.stop - start],
                )
            if interleaved:
                planar[:tall].view(tall, channels, width).copy_(mixed[:tall].view(tall, width, channels).mT)
            for block in columns:
                torch.mm(lines[:, block.first : block.last], block.weights.T, out=result[:, block.start : block.stop])
            result.clamp_(0, 255).round_()
            resized[index, :, start:stop] = result.view(tall, channels, size[1]).transpose(0, 1)
    return resized


def _blocks(inputs: int, outputs: int, interpolation: str, step: int) -> list[_Block]:
    """Returns the resampling weights of one side as blocks of ``step`` outputs along the diagonal.

    Computed in single precision in the order of PyTorch's kernel: a weight that differs in its last digits would
    occasionally change a rounding.
    """
    reach, kernel = (2.0, _cubic) if interpolation == "bicubic" else (1.0, _triangle)
    scale = float(np.float32(inputs) / np.float32(outputs))
    stretch = max(scale, 1.0)  # antialias: downscaling widens the kernel
    support = np.float32(reach * stretch)
    centre = (scale * (np.arange(outputs) + 0.5)).astype(np.float32)
    first = np.maximum(((centre - support) + 0.5).astype(np.int64), 0)
    last = np.minimum(((centre + support) + 0.5).astype(np.int64), inputs)
    taps = int((last - first).max())
    index = first[:, None] + np.arange(taps)
    distance = np.arange(taps, dtype=np.float32) + (first.astype(np.float32) - centre)[:, None]
    distance = ((distance + np.float64(0.5)) / stretch).astype(np.float32)
    weights = np.where(index < last[:, None], kernel(np.abs(distance)), np.float32(0))
    weights /= weights.sum(axis=1, keepdims=True, dtype=np.float32)
    blocks = []
    for start in range(0, outputs, step):
        stop = min(start + step, outputs)
        low, high = int(first[start:stop].min()), int(last[start:stop].max())
        dense = np.zeros((stop - start, high - low + taps), np.float32)  # extra columns for the zero taps past an end
        np.put_along_axis(dense, index[start:stop] - low, weights[start:stop], axis=1)
        blocks.append(_Block(start, stop, low, high, torch.from_numpy(dense[:, : high - low].copy())))
    return blocks


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic kernel with a = -0.5 at distances x >= 0."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, np.float32(0)))


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - x, np.float32(0))


def _smart_size(height: int, width: int, num_frames: int, options: ResizeOptions) -> tuple[int, int]:
    factor = options.size_factor
    low = options.min_pixels if options.min_pixels is not None else MIN_TOKENS * factor**2
    high = options.max_pixels if options.max_pixels is not None else MAX_TOKENS * factor**2
    if options.pixel_budget == "video":
        limits = (options.temporal_factor, options.max_aspect)
        return smart_resize_volume(height, width, num_frames, factor, low, high, *limits)
    total = options.total_pixels if options.total_pixels is not None else CONTEXT_TOKENS * factor**2 * 0.9
    share = total / num_frames * options.temporal_factor
    limit = max(min(MAX_TOKENS * factor**2, share), int(low * 1.05))
    return smart_resize(height, width, factor, low, min(high, limit), options.max_aspect)


def _within_budgets(
    size: Size, num_frames: int, rounded: Size, pixels: int, factor: int, budgets: tuple[float, float], limit: float
) -> Size:
    """Returns ``rounded`` if its number of ``pixels`` is within the budgets, else ``size`` scaled to the nearer one."""
    (height, width), (min_pixels, max_pixels) = size, budgets
    if min_pixels > max_pixels:
        raise ValueError(f"min_pixels={min_pixels:g} is above max_pixels={max_pixels:g}: lower it or raise max_pixels.")
    aspect = max(size) / min(size)
    if aspect > limit:
        raise LimitError(
            f"Frames of {width}x{height} pixels have an aspect ratio of {aspect:.4g}, above max_aspect={limit:g}: "
            "crop the video, raise max_aspect, or use rule='stretch'."
        )
    if pixels > max_pixels:
        shrink = math.sqrt(num_frames * height * width / max_pixels)
        floored = [max(factor, math.floor(side / shrink / factor) * factor) for side in size]
        return floored[0], floored[1]
    if pixels < min_pixels:
        grow = math.sqrt(min_pixels / (num_frames * height * width))
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return rounded


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"image_size={size} is not a size in pixels: use a number of at least 1, or (height, width).")
    return pair[0], pair[1]


def _check_frames(frames: Tensor) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.numel() == 0:
        found = f"{frames.dtype} of shape {tuple(frames.shape)}"
        raise ValueError(f"frames are {found}, but must be uint8 (T, 3, H, W) with at least one frame.")


def _check_resampling(resample: str, interpolation: str) -> None:
    check_choice("resample", resample, RESAMPLES)
    check_choice("interpolation", interpolation, INTERPOLATIONS)
