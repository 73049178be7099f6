"""Output formats: converts uint8 frames to the input of a model, a library or an API.

All functions take frames uint8 (T, 3, H, W) in RGB. Shapes: T frames, H, W pixels; p = ``patch_size``, m =
``merge_size``, tp = ``temporal_patch_size``; the grid is (t, h, w) = (⌈T / tp⌉, H / p, W / p).

Pixels are converted to float in chunks of a few frames, so that peak memory is the result plus one chunk.
"""

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from blueberry_video.video.ranges import check_at_least, check_between, check_choice

FORMATS = ("tensor", "numpy", "pil", "base64", "huggingface", "openai")
PICTURES = ("pil", "base64", "openai")
DTYPES = {"uint8": torch.uint8, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CHANNELS = ("rgb", "bgr")
LAYOUTS = {"tchw": (0, 1, 2, 3), "cthw": (1, 0, 2, 3), "thwc": (0, 2, 3, 1)}  # as a permutation of (T, C, H, W)
IMAGE_FORMATS = ("jpeg", "png")
DETAILS = ("low", "high", "auto")
HUGGINGFACE_LAYOUTS = ("patches", "frames")
PATCH_TIMES = ("none", "second_per_grid_ts", "timestamps")

_CHUNK = 1 << 22  # values per float32 chunk: 16 MiB

Triple = tuple[float, float, float]
Formatted = Tensor | np.ndarray | list[Image.Image] | list[str] | list[dict[str, Any]] | dict[str, Tensor]


def _check_device(device: str) -> None:
    try:
        usable = torch.device(device).type != "meta"
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # depends on the torch build
        raise ValueError(f"device={device!r} is not available: use cpu, cuda, cuda:1 or mps. ({error})") from error
    if not usable:
        raise ValueError(f"device={device!r} has no data: use cpu, cuda, cuda:1 or mps.")


@dataclass(frozen=True)
class PixelValues:
    """Pixel conversion of tensor formats; the fields are documented in :class:`FormatOptions`.

    Raises:
        ValueError: a value out of range, or ``rescale``, ``mean`` or ``std`` with uint8.
    """

    dtype: str = "uint8"
    channels: str = "rgb"
    rescale: bool = False
    mean: Triple | None = None
    std: Triple | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        mean, std = self.mean, self.std
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("channels", self.channels, CHANNELS)
        if self.dtype == "uint8" and (self.rescale or mean is not None or std is not None):
            given = f"dtype=uint8 with rescale={self.rescale}, mean={mean}, std={std}"
            raise ValueError(f"{given}: use a float dtype, or set rescale=false and remove mean and std.")
        both = [numbers for numbers in (mean, std) if numbers is not None]
        valid = len(both) != 1 and all(len(numbers) == 3 and all(map(math.isfinite, numbers)) for numbers in both)
        if not valid or (std is not None and min(std) <= 0):
            raise ValueError(f"mean={mean} and std={std}: set both to three finite numbers, std above 0, or neither.")
        _check_device(self.device)


UNCHANGED = PixelValues()  # uint8 RGB on the CPU
UNIT_RANGE = PixelValues(dtype="float32", rescale=True)  # float32 RGB in [0, 1]


@dataclass(frozen=True)
class FormatOptions:
    """Output format of the frames.

    ``pil``, ``base64`` and ``openai`` are images, always uint8 RGB: ``dtype``, ``layout``, ``rescale``, ``mean``,
    ``std`` and ``device`` are ignored. ``numpy`` arrays are on the CPU.

    Attributes:
        format: ``tensor``, ``numpy``, ``pil`` (a list of images), ``base64`` (a list of data URIs), ``huggingface``
            (inputs of a model's ``forward``) or ``openai`` (parts of a chat message).
        dtype: ``uint8`` (0..255), ``float32``, ``float16`` or ``bfloat16`` (unsupported by ``numpy``).
        channels: ``rgb``, or ``bgr`` as in OpenCV (not for images).
        layout: order of the axes of ``tensor`` and ``numpy``: ``tchw``, ``cthw`` or ``thwc``.
        rescale: divide by 255, to [0, 1]; requires a float ``dtype``.
        mean: three numbers, in the order of ``channels``, subtracted after ``rescale``; None: no normalization.
        std: three numbers above 0 that divide the result; requires ``mean``.
        device: device of a tensor: ``cpu``, ``cuda``, ``cuda:1`` …
        image_format: for ``base64`` and ``openai``: ``jpeg`` (small) or ``png`` (lossless).
        jpeg_quality: 1 to 100.
        detail: for ``openai``: image detail, ``low``, ``high`` or ``auto`` (chosen by the model).
        time_marks: for ``openai``: add the time of each frame as text before it.
        huggingface_layout: ``patches`` (t·h·w, 3·tp·p·p) with ``video_grid_thw``, for the Qwen-VL models, or ``frames``
            (1, T, 3, H, W), for LLaVA and InternVL.
        patch_times: times in addition to ``patches``: ``none`` (Qwen2-VL), ``second_per_grid_ts`` (Qwen2.5-VL) or
            ``timestamps`` (Qwen3-VL: for the prompt, not for ``forward``).

    Raises:
        ValueError: a value out of range, or values that exclude each other.
    """

    format: str = "tensor"
    dtype: str = "uint8"
    channels: str = "rgb"
    layout: str = "tchw"
    rescale: bool = False
    mean: Triple | None = None
    std: Triple | None = None
    device: str = "cpu"
    image_format: str = "jpeg"
    jpeg_quality: int = 90
    detail: str = "auto"
    time_marks: bool = True
    huggingface_layout: str = "patches"
    patch_times: str = "none"

    def __post_init__(self) -> None:
        for key in ("mean", "std"):
            if getattr(self, key) is not None:
                object.__setattr__(self, key, tuple(getattr(self, key)))
        check_choice("format", self.format, FORMATS)
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("detail", self.detail, DETAILS)
        check_choice("huggingface_layout", self.huggingface_layout, HUGGINGFACE_LAYOUTS)
        check_choice("patch_times", self.patch_times, PATCH_TIMES)
        _check_image_format(self.image_format, self.jpeg_quality)
        if self.format == "numpy":
            _check_numpy_dtype(self.dtype)
        if self.format not in PICTURES:
            _ = self.values  # validates the combination
        elif self.channels != "rgb":
            raise ValueError(f"channels={self.channels} with format={self.format}: images are RGB; use channels=rgb.")

    @property
    def values(self) -> PixelValues:
        """Pixel conversion of tensor formats."""
        return PixelValues(self.dtype, self.channels, self.rescale, self.mean, self.std, self.device)


def format_frames(
    frames: Tensor,
    timestamps: Tensor,
    options: FormatOptions,
    patch_size: int = 14,
    merge_size: int = 2,
    temporal_patch_size: int = 2,
    seconds_per_frame: float | None = None,
) -> Formatted:
    """Converts frames uint8 (T, 3, H, W) with timestamps in seconds (T,) to the format in ``options``.

    The three sizes and ``seconds_per_frame`` are used only by ``format=huggingface`` with
    ``huggingface_layout=patches``. Raises as the function of the format.
    """
    _check(frames, timestamps)
    o = options
    if o.format == "tensor":
        return to_tensor(frames, o.values, o.layout)
    if o.format == "numpy":
        return to_numpy(frames, o.values, o.layout)
    if o.format == "pil":
        return to_pil(frames)
    if o.format == "base64":
        return to_base64(frames, o.image_format, o.jpeg_quality)
    if o.format == "openai":
        return to_openai(frames, timestamps if o.time_marks else None, o.image_format, o.jpeg_quality, o.detail)
    if o.huggingface_layout == "frames":
        return {"pixel_values_videos": to_tensor(frames, o.values)[None]}
    sizes = (patch_size, merge_size, temporal_patch_size)
    return to_huggingface(frames, timestamps, o.values, *sizes, o.patch_times, seconds_per_frame)


def to_tensor(frames: Tensor, values: PixelValues = UNCHANGED, layout: str = "tchw") -> Tensor:
    """Returns the frames as a contiguous tensor with the axes of ``layout``; the input itself if nothing changes.

    Raises:
        TypeError: frames that are not a uint8 tensor.
        ValueError: a wrong shape or an unknown layout.
    """
    _check(frames)
    check_choice("layout", layout, LAYOUTS)
    if (values.dtype, values.channels, layout) == ("uint8", "rgb", "tchw"):
        return frames.to(values.device).contiguous()
    order = LAYOUTS[layout]
    result = torch.empty([frames.shape[axis] for axis in order], dtype=DTYPES[values.dtype], device=values.device)
    as_frames = result.permute([order.index(axis) for axis in range(4)])  # (T, 3, H, W)
    step = max(_CHUNK // frames[0].numel(), 1)
    for i in range(0, len(frames), step):
        as_frames[i : i + step] = _converted(frames[i : i + step], values)
    return result


def to_numpy(frames: Tensor, values: PixelValues = UNCHANGED, layout: str = "thwc") -> np.ndarray:
    """Returns :func:`to_tensor` as an array on the CPU. Raises also for ``dtype=bfloat16``."""
    _check_numpy_dtype(values.dtype)
    return to_tensor(frames, values, layout).cpu().numpy()


def to_pil(frames: Tensor) -> list[Image.Image]:
    """Returns T images of mode RGB; raises as :func:`to_tensor`."""
    _check(frames)
    return [Image.fromarray(frame.permute(1, 2, 0).contiguous().cpu().numpy()) for frame in frames]


def to_base64(frames: Tensor, image_format: str = "jpeg", jpeg_quality: int = 90) -> list[str]:
    """Returns T data URIs ``data:image/jpeg;base64,…``; raises as :func:`to_pil`, and for a wrong format or quality."""
    _check_image_format(image_format, jpeg_quality)
    _check(frames)
    settings = {"quality": jpeg_quality} if image_format == "jpeg" else {}
    uris = []
    for i in range(len(frames)):  # one image at a time, to limit memory
        file = io.BytesIO()
        to_pil(frames[i : i + 1])[0].save(file, image_format, **settings)
        uris.append(f"data:image/{image_format};base64,{base64.b64encode(file.getvalue()).decode('ascii')}")
    return uris


def to_openai(
    frames: Tensor,
    timestamps: Tensor | None = None,
    image_format: str = "jpeg",
    jpeg_quality: int = 90,
    detail: str = "auto",
) -> list[dict[str, Any]]:
    """Returns the ``content`` of a user message of OpenAI's chat completions: an ``image_url`` part per frame, preceded
    by a ``text`` part with its time, ``[12.3 s]``, if timestamps (T,) in seconds are passed. Raises as
    :func:`to_base64`, and for an unknown ``detail`` or a wrong number of timestamps."""
    check_choice("detail", detail, DETAILS)
    _check(frames, timestamps)
    parts: list[dict[str, Any]] = []
    for i, uri in enumerate(to_base64(frames, image_format, jpeg_quality)):
        if timestamps is not None:
            parts.append({"type": "text", "text": f"[{float(timestamps[i]):.1f} s]"})
        parts.append({"type": "image_url", "image_url": {"url": uri, "detail": detail}})
    return parts


def to_huggingface(
    frames: Tensor,
    timestamps: Tensor,
    values: PixelValues = UNIT_RANGE,
    patch_size: int = 14,
    merge_size: int = 2,
    temporal_patch_size: int = 2,
    patch_times: str = "none",
    seconds_per_frame: float | None = None,
) -> dict[str, Tensor]:
    """Returns the output of transformers' Qwen2-VL, Qwen2.5-VL and Qwen3-VL video processors for one video.

    Returns:
        ``pixel_values_videos`` (t·h·w, 3·tp·p·p), see :func:`to_patches`, and ``video_grid_thw`` (1, 3) int64.
        With ``patch_times=second_per_grid_ts``: (1,) float32, tp · ``seconds_per_frame``, as transformers; if that is
        None, tp times the mean spacing of the timestamps.
        With ``patch_times=timestamps``: (t,) float64, the mean of each patch's first and last timestamp.

    Raises:
        TypeError, ValueError: as :func:`to_patches`; an unknown ``patch_times`` or a wrong number of timestamps.
    """
    check_choice("patch_times", patch_times, PATCH_TIMES)
    _check(frames, timestamps)
    patches = to_patches(frames, values, patch_size, merge_size, temporal_patch_size)
    starts = range(0, len(frames), temporal_patch_size)
    grid = [len(starts), frames.shape[2] // patch_size, frames.shape[3] // patch_size]
    result = {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([grid], device=values.device)}
    if patch_times == "second_per_grid_ts":
        seconds = _spacing(timestamps) if seconds_per_frame is None else seconds_per_frame
        result[patch_times] = torch.tensor([temporal_patch_size * seconds], dtype=torch.float32, device=values.device)
    elif patch_times == "timestamps":
        ends = [min(start + temporal_patch_size, len(frames)) - 1 for start in starts]
        result[patch_times] = (timestamps[list(starts)] + timestamps[ends]).to(values.device) / 2
    return result


def to_patches(
    frames: Tensor,
    values: PixelValues = UNIT_RANGE,
    patch_size: int = 14,
    merge_size: int = 2,
    temporal_patch_size: int = 2,
) -> Tensor:
    """Returns flattened patches (t·h·w, 3·tp·p·p) in the order of transformers' ``Qwen2VLVideoProcessor``.

    The m x m patches that the model merges into one token are consecutive; the values of a patch are in (channel, time,
    row, column) order. The last frame is repeated up to a multiple of tp; for chunks with a multiple of tp frames, the
    concatenated patches equal those of the whole video.

    Raises:
        TypeError: frames that are not a uint8 tensor.
        ValueError: a wrong shape, H or W that is not a multiple of p · m, or a size below 1.
    """
    _check(frames)
    p, m, tp = patch_size, merge_size, temporal_patch_size
    check_at_least(1, patch_size=p, merge_size=m, temporal_patch_size=tp)
    height, width = frames.shape[2:]
    if height % (p * m) or width % (p * m):
        near_height, near_width = (max(round(size / (p * m)), 1) * p * m for size in (height, width))
        raise ValueError(
            f"Frames of {height} x {width} pixels (H x W) must be multiples of patch_size={p} · merge_size={m} = "
            f"{p * m}: resize them, for example to {near_height} x {near_width}."
        )
    t, h, w = math.ceil(len(frames) / tp), height // (p * m), width // (p * m)  # h, w in merged patches
    result = torch.empty(t * h * w * m * m, 3 * tp * p * p, dtype=DTYPES[values.dtype], device=values.device)
    grid = result.view(t, h, w, m, m, 3, tp, p, p)
    step = max(_CHUNK // (tp * frames[0].numel()), 1)
    for i in range(0, t, step):
        part = frames[i * tp : (i + step) * tp]
        if lacking := -len(part) % tp:
            part = torch.cat((part, part[-1:].expand(lacking, -1, -1, -1)))
        pattern = "(t tp) c (h mh ph) (w mw pw) -> t h w mh mw c tp ph pw"
        grid[i : i + step] = rearrange(_converted(part, values), pattern, tp=tp, mh=m, mw=m, ph=p, pw=p)
    return result


def _converted(frames: Tensor, values: PixelValues) -> Tensor:
    """Converts a few frames on their device: to uint8, or to float32 for every float dtype."""
    frames = frames.to(values.device)  # as uint8: a quarter of the bytes
    if values.channels == "bgr":
        frames = frames.flip(1)
    if values.dtype == "uint8":
        return frames
    pixels = frames.float()
    unit = 255.0 if values.rescale else 1.0
    if values.mean is None or values.std is None:
        return pixels.div_(unit)
    # rescaling is folded into mean and std, as in transformers, for bit-identical results
    mean, std = (
        torch.tensor(numbers, dtype=torch.float32, device=pixels.device).view(3, 1, 1) * unit
        for numbers in (values.mean, values.std)
    )
    return pixels.sub_(mean).div_(std)


def _spacing(timestamps: Tensor) -> float:
    """Returns the mean seconds between consecutive distinct frames; 1 for a single frame, where it has no effect."""
    distinct = timestamps.unique()  # ascending, for frames in any order
    return float(distinct[-1] - distinct[0]) / (len(distinct) - 1) if len(distinct) > 1 else 1.0


def _check(frames: Tensor, timestamps: Tensor | None = None) -> None:
    if not isinstance(frames, Tensor) or frames.dtype != torch.uint8:
        found = frames.dtype if isinstance(frames, Tensor) else type(frames).__name__
        raise TypeError(f"frames has type {found}, but must be a uint8 tensor (T, 3, H, W) with values 0..255.")
    if frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames has the shape {tuple(frames.shape)}, but must be (T, 3, H, W) and not empty.")
    if timestamps is not None and timestamps.shape != frames.shape[:1]:
        given = f"timestamps has the shape {tuple(timestamps.shape)}, but there are {len(frames)} frames"
        raise ValueError(f"{given}: pass one time in seconds per frame.")


def _check_numpy_dtype(dtype: str) -> None:
    if dtype == "bfloat16":
        raise ValueError("dtype=bfloat16 is not supported by format=numpy: use float32 or float16.")


def _check_image_format(image_format: str, jpeg_quality: int) -> None:
    check_choice("image_format", image_format, IMAGE_FORMATS)
    check_between(1, 100, jpeg_quality=jpeg_quality)
