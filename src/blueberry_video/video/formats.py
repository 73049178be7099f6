"""The last stage: frames of whole numbers become what a model, a library or an API takes.

Every function takes frames uint8 (T, 3, H, W) in RGB. Shapes: T frames, H, W pixels; p = ``patch_size``, m =
``merge_size``, tp = ``temporal_patch_size``; the grid is (t, h, w) = (⌈T / tp⌉, H / p, W / p).

Pixels become floats a few frames at a time, straight into the result: the peak is the result plus one such chunk.
"""

import base64
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

FORMATS = ("tensor", "numpy", "pil", "base64", "huggingface", "openai")
PICTURES = ("pil", "base64", "openai")
DTYPES = {"uint8": torch.uint8, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CHANNELS = ("rgb", "bgr")
LAYOUTS = {"tchw": (0, 1, 2, 3), "cthw": (1, 0, 2, 3), "thwc": (0, 2, 3, 1)}  # as a permutation of (T, C, H, W)
IMAGE_FORMATS = ("jpeg", "png")
DETAILS = ("low", "high", "auto")
HUGGINGFACE_LAYOUTS = ("patches", "frames")
PATCH_TIMES = ("none", "second_per_grid_ts", "timestamps")

_CHUNK = 1 << 22  # values that are float32 at one time: 16 MiB

Triple = tuple[float, float, float]
Formatted = Tensor | np.ndarray | list[Image.Image] | list[str] | list[dict[str, Any]] | dict[str, Tensor]


def _refuse_other(key: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{key}={value!r} does not exist: choose from {', '.join(choices)}.")


def _refuse_device(device: str) -> None:
    try:
        usable = torch.device(device).type != "meta"
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's builds each have their own
        raise ValueError(f"device={device!r} cannot be used here: use cpu, cuda, cuda:1 or mps. ({error})") from error
    if not usable:
        raise ValueError(f"device={device!r} holds no pixels: use cpu, cuda, cuda:1 or mps.")


@dataclass(frozen=True)
class PixelValues:
    """What a pixel becomes: the part of :class:`FormatOptions`, where the fields are explained, that tensors share.

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
        _refuse_other("dtype", self.dtype, DTYPES)
        _refuse_other("channels", self.channels, CHANNELS)
        if self.dtype == "uint8" and (self.rescale or mean is not None or std is not None):
            raise ValueError(
                f"dtype=uint8 with rescale={self.rescale}, mean={mean}, std={std}: whole numbers cannot hold such "
                "values. Choose a float dtype, or set rescale=false and leave out mean and std."
            )
        given = [numbers for numbers in (mean, std) if numbers is not None]
        lawful = len(given) != 1 and all(len(numbers) == 3 and all(map(math.isfinite, numbers)) for numbers in given)
        if not lawful or (std is not None and min(std) <= 0):
            raise ValueError(
                f"mean={mean} and std={std}: give both, each three finite numbers, one a channel, and std above 0; or "
                "neither."
            )
        _refuse_device(self.device)


AS_THEY_ARE = PixelValues()  # uint8 RGB on the CPU
UNIT_RANGE = PixelValues(dtype="float32", rescale=True)  # float32 RGB in [0, 1]


@dataclass(frozen=True)
class FormatOptions:
    """What comes out. ``pil``, ``base64`` and ``openai`` are pictures: RGB in whole numbers, whatever ``dtype``,
    ``layout``, ``rescale``, ``mean``, ``std`` and ``device`` say; ``numpy`` lies on the CPU.

    Attributes:
        format: ``tensor``, ``numpy``, ``pil`` (a list of images), ``base64`` (a list of data URIs), ``huggingface``
            (what a model's ``forward`` takes) or ``openai`` (parts of a chat message).
        dtype: ``uint8`` (0..255), ``float32``, ``float16`` or ``bfloat16`` (not for ``numpy``, which has no such type).
        channels: ``rgb``, or ``bgr`` as OpenCV has them (not for pictures).
        layout: order of the axes of ``tensor`` and ``numpy``: ``tchw``, ``cthw`` or ``thwc``.
        rescale: divide by 255, to [0, 1]; needs a float ``dtype``.
        mean: three numbers, in the order of ``channels``, that are subtracted after ``rescale``; None: nothing is.
        std: three numbers above 0 that are divided by after that; goes with ``mean``.
        device: where a tensor lies: ``cpu``, ``cuda``, ``cuda:1`` …
        image_format: of ``base64`` and ``openai``: ``jpeg`` (small) or ``png`` (exact).
        jpeg_quality: 1 to 100.
        detail: of ``openai``: how closely the model looks, ``low``, ``high`` or ``auto`` (it decides).
        time_marks: of ``openai``: the time of each frame as text before it.
        huggingface_layout: ``patches`` (t·h·w, 3·tp·p·p) with ``video_grid_thw``, as the Qwen-VL models take them, or
            ``frames`` (1, T, 3, H, W), as LLaVA and InternVL do.
        patch_times: what ``patches`` come with: ``none`` (Qwen2-VL), ``second_per_grid_ts`` (Qwen2.5-VL) or
            ``timestamps`` (Qwen3-VL: for the prompt, its ``forward`` does not take them).

    Raises:
        ValueError: a value out of range, or two that exclude each other.
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
        _refuse_other("format", self.format, FORMATS)
        _refuse_other("layout", self.layout, LAYOUTS)
        _refuse_other("detail", self.detail, DETAILS)
        _refuse_other("huggingface_layout", self.huggingface_layout, HUGGINGFACE_LAYOUTS)
        _refuse_other("patch_times", self.patch_times, PATCH_TIMES)
        _refuse_image_format(self.image_format, self.jpeg_quality)
        if self.format == "numpy":
            _refuse_numpy(self.dtype)
        if self.format not in PICTURES:
            _ = self.values  # refuses what does not go together
        elif self.channels != "rgb":
            raise ValueError(f"channels={self.channels} with format={self.format}: pictures are RGB; use channels=rgb.")

    @property
    def values(self) -> PixelValues:
        return PixelValues(self.dtype, self.channels, self.rescale, self.mean, self.std, self.device)


def format_frames(
    frames: Tensor,
    timestamps: Tensor,
    options: FormatOptions,
    patch_size: int = 14,
    merge_size: int = 2,
    temporal_patch_size: int = 2,
) -> Formatted:
    """Frames uint8 (T, 3, H, W) and their times in seconds (T,) in the format that ``options`` names.

    The three sizes matter to ``format=huggingface`` with ``huggingface_layout=patches`` alone.

    Raises:
        TypeError, ValueError: as the function of that format.
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
    return to_huggingface(frames, timestamps, o.values, patch_size, merge_size, temporal_patch_size, o.patch_times)


def to_tensor(frames: Tensor, values: PixelValues = AS_THEY_ARE, layout: str = "tchw") -> Tensor:
    """Frames as a contiguous tensor, its axes in the order of ``layout``.

    Where nothing is to change, the frames themselves are returned.

    Raises:
        TypeError: frames that are no uint8 tensor.
        ValueError: a wrong shape or another layout.
    """
    _check(frames)
    _refuse_other("layout", layout, LAYOUTS)
    if (values.dtype, values.channels, layout) == ("uint8", "rgb", "tchw"):
        return frames.to(values.device).contiguous()
    order = LAYOUTS[layout]
    result = torch.empty([frames.shape[axis] for axis in order], dtype=DTYPES[values.dtype], device=values.device)
    as_frames = result.permute([order.index(axis) for axis in range(4)])  # (T, 3, H, W)
    step = max(_CHUNK // frames[0].numel(), 1)
    for i in range(0, len(frames), step):
        as_frames[i : i + step] = _converted(frames[i : i + step], values)
    return result


def to_numpy(frames: Tensor, values: PixelValues = AS_THEY_ARE, layout: str = "thwc") -> np.ndarray:
    """:func:`to_tensor` as an array; what the device of ``values`` has converted comes back to the CPU.

    Raises:
        TypeError, ValueError: as :func:`to_tensor`, and for ``dtype=bfloat16``.
    """
    _refuse_numpy(values.dtype)
    return to_tensor(frames, values, layout).cpu().numpy()


def to_pil(frames: Tensor) -> list[Image.Image]:
    """T images of mode RGB.

    Raises:
        TypeError, ValueError: frames that are not uint8 (T, 3, H, W).
    """
    _check(frames)
    return [Image.fromarray(frame.permute(1, 2, 0).contiguous().cpu().numpy()) for frame in frames]


def to_base64(frames: Tensor, image_format: str = "jpeg", jpeg_quality: int = 90) -> list[str]:
    """T data URIs, ``data:image/jpeg;base64,…``.

    Raises:
        TypeError, ValueError: as :func:`to_pil`, and for a format or quality out of range.
    """
    _refuse_image_format(image_format, jpeg_quality)
    _check(frames)
    settings = {"quality": jpeg_quality} if image_format == "jpeg" else {}
    uris = []
    for i in range(len(frames)):  # one picture at a time, not a list of all of them
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
    """The ``content`` of a user's message in OpenAI's chat completions: an ``image_url`` part a frame, each after a
    ``text`` part with its time, ``[12.3 s]``, where timestamps (T,) in seconds are given.

    Raises:
        TypeError, ValueError: as :func:`to_base64`, and for another ``detail`` or number of timestamps.
    """
    _refuse_other("detail", detail, DETAILS)
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
) -> dict[str, Tensor]:
    """What transformers' Qwen2-VL, Qwen2.5-VL and Qwen3-VL video processors return for one video.

    Returns:
        ``pixel_values_videos`` (t·h·w, 3·tp·p·p), see :func:`to_patches`, and ``video_grid_thw`` (1, 3) int64.
        With ``patch_times=second_per_grid_ts``: (1,) float32, seconds from one temporal patch to the next, from the
        true timestamps (transformers: tp · duration / T, the same where frames are evenly spaced from the start).
        With ``patch_times=timestamps``: (t,) float64, the mean of each patch's first and last timestamp.

    Raises:
        TypeError, ValueError: as :func:`to_patches`, and for another ``patch_times`` or number of timestamps.
    """
    _refuse_other("patch_times", patch_times, PATCH_TIMES)
    _check(frames, timestamps)
    patches = to_patches(frames, values, patch_size, merge_size, temporal_patch_size)
    starts = range(0, len(frames), temporal_patch_size)
    grid = [len(starts), frames.shape[2] // patch_size, frames.shape[3] // patch_size]
    result = {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([grid], device=values.device)}
    if patch_times == "second_per_grid_ts":
        result[patch_times] = torch.tensor([temporal_patch_size * _spacing(timestamps)], device=values.device)
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
    """Flattened patches (t·h·w, 3·tp·p·p) in the order of transformers' ``Qwen2VLVideoProcessor``.

    The m x m patches that the model merges into one token follow each other; a patch's values are in (channel, time,
    row, column) order. The last frame is repeated up to a multiple of tp, so where T is one already, the patches of
    chunks, one after the other, are those of the whole.

    Raises:
        TypeError: frames that are no uint8 tensor.
        ValueError: a wrong shape, H or W that p · m does not divide, or a size below 1.
    """
    _check(frames)
    p, m, tp = patch_size, merge_size, temporal_patch_size
    if min(p, m, tp) < 1:
        raise ValueError(f"patch_size={p}, merge_size={m}, temporal_patch_size={tp}: each must be at least 1.")
    height, width = frames.shape[2:]
    if height % (p * m) or width % (p * m):
        near_height, near_width = (max(round(size / (p * m)), 1) * p * m for size in (height, width))
        raise ValueError(
            f"Frames of {height} x {width} pixels (H x W) do not divide into patches of {p}, {m} x {m} of them merged: "
            f"resize them to multiples of {p * m}, such as {near_height} x {near_width}."
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
    """A few frames on their device with their final values: uint8, or float32 for every float dtype."""
    frames = frames.to(values.device)  # as whole numbers: a quarter of the bytes
    if values.channels == "bgr":
        frames = frames.flip(1)
    if values.dtype == "uint8":
        return frames
    pixels = frames.float()
    unit = 255.0 if values.rescale else 1.0
    if values.mean is None or values.std is None:
        return pixels.div_(unit)
    # rescaling is part of the two numbers, as transformers does it: the same bit for bit
    mean, std = (
        torch.tensor(numbers, dtype=torch.float32, device=pixels.device).view(3, 1, 1) * unit
        for numbers in (values.mean, values.std)
    )
    return pixels.sub_(mean).div_(std)


def _spacing(timestamps: Tensor) -> float:
    """Mean seconds from a frame to the next, repeated frames left out; 1 for a still, where nothing depends on it."""
    distinct = timestamps.unique()  # ascending, whatever order the frames were asked for in
    return float(distinct[-1] - distinct[0]) / (len(distinct) - 1) if len(distinct) > 1 else 1.0


def _check(frames: Tensor, timestamps: Tensor | None = None) -> None:
    if not isinstance(frames, Tensor) or frames.dtype != torch.uint8:
        found = frames.dtype if isinstance(frames, Tensor) else type(frames).__name__
        raise TypeError(f"frames is {found}, but must be a uint8 tensor (T, 3, H, W) with values 0..255.")
    if frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames has the shape {tuple(frames.shape)}, but must be (T, 3, H, W), none of them 0.")
    if timestamps is not None and timestamps.shape != frames.shape[:1]:
        raise ValueError(
            f"timestamps has the shape {tuple(timestamps.shape)}, but there are {len(frames)} frames: give one time, "
            "in seconds, for each."
        )


def _refuse_numpy(dtype: str) -> None:
    if dtype == "bfloat16":
        raise ValueError("dtype=bfloat16 with format=numpy: NumPy has no such type; use float32 or float16.")


def _refuse_image_format(image_format: str, jpeg_quality: int) -> None:
    _refuse_other("image_format", image_format, IMAGE_FORMATS)
    if not 1 <= jpeg_quality <= 100:
        raise ValueError(f"jpeg_quality={jpeg_quality} is out of range: use 1 to 100, 90 for little visible loss.")
