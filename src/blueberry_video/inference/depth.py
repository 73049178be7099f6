"""Depth of videos of any length, at constant memory: frame by frame, as a stream, or in overlapping windows.

The windows of mode ``windows``, their keyframes and their alignment are those of Video Depth Anything (arXiv
2501.12375, github.com/DepthAnything/Video-Depth-Anything).

Shapes: n frames of H x W pixels in, maps of the same size out; h x w pixels at the input of the network.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blueberry_video.models.depth_anything.model import DepthAnything
from blueberry_video.models.depth_anything.video import VideoDepthAnything
from blueberry_video.nn.alignment import least_squares_alignment

Mode = Literal["auto", "frames", "stream", "windows", "sliding"]
MODES = ("auto", "frames", "stream", "windows", "sliding")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WINDOW = 32  # frames of a window; the temporal attention has as many positions
KEYFRAMES = (0, 12, *range(24, 32))  # frames of a window that begin the next one
BLENDED = 8  # the last keyframes: their maps are blended with those of the previous window
WIDE = 1.777  # aspect ratio above which the published inference lowers the resolution


def network_size(height: int, width: int, input_size: int = 518, multiple: int = 14) -> tuple[int, int]:
    """Size at which a network sees frames: the shorter side at least ``input_size``, both multiples of the patch size.

    The aspect ratio is kept up to rounding. Frames wider or higher than 16:9 get a proportionally smaller size, as in
    the published inference.

    Args:
        height, width: of the frames, in pixels.
        input_size: shorter side in pixels, rounded to a multiple of ``multiple``.
        multiple: patch size of the network.

    Raises:
        ValueError: for a side below 1 or an ``input_size`` below ``multiple``.
    """
    if min(height, width) < 1 or input_size < multiple:
        raise ValueError(
            f"input_size={input_size} must be at least {multiple}, the patch size, and frames of {height}x{width} "
            "pixels at least 1x1."
        )
    ratio = max(height, width) / min(height, width)
    if ratio > 1.78:
        input_size = max(multiple, round(int(input_size * WIDE / ratio) / multiple) * multiple)
    scale = max(input_size / height, input_size / width)
    sides = []
    for side in (height, width):
        rounded = round(scale * side / multiple) * multiple
        sides.append(rounded if rounded >= input_size else math.ceil(scale * side / multiple) * multiple)
    return sides[0], sides[1]


class DepthStream(ABC):
    """Maps of a stream of frames.

    :meth:`push` accepts consecutive frames and returns the maps that are final; :meth:`finish` returns the remaining
    ones. Memory does not depend on the number of frames. The state can be saved and restored between two calls.

    Args:
        model: in evaluation mode; frames are moved to its device.
        size: (H, W) of the frames and maps.
        input_size: shorter side of the frames at the input of the network, see :func:`network_size`.

    Attributes:
        mean, std: normalization of the model's input, per channel; those of ImageNet unless they are assigned.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __init__(self, model: nn.Module, size: tuple[int, int], input_size: int = 518):
        self.model, self.size = model, size
        encoder: Any = model.pretrained
        self.network_size = network_size(*size, input_size, encoder.patch_size[1])
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    @torch.inference_mode()
    def push(self, frames: Tensor) -> Tensor:
        """Adds frames.

        Args:
            frames: uint8 (n, 3, H, W) RGB.

        Returns:
            The next maps that are final, float32 (m, H, W) on the CPU, m at least 0.

        Raises:
            ValueError: for frames of a different shape or type.
        """
        if frames.dtype != torch.uint8 or tuple(frames.shape[1:]) != (3, *self.size):
            raise ValueError(
                f"frames is {frames.dtype} of shape {tuple(frames.shape)}: it must be uint8 (n, 3, {self.size[0]}, "
                f"{self.size[1]})."
            )
        return self._stacked(self._push(self._input(frames)))

    @torch.inference_mode()
    def finish(self) -> Tensor:
        """Ends the stream and returns the remaining maps, float32 (m, H, W)."""
        return self._stacked(self._finish())

    def state_dict(self) -> dict[str, Any]:
        """State of the stream: tensors, numbers, and lists of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state of :meth:`state_dict`."""
        for name, value in state.items():
            setattr(self, name, value)

    @abstractmethod
    def _push(self, frames: Tensor) -> list[Tensor]:
        """Adds frames (n, 3, h, w) at the input of the network; returns maps (H, W)."""

    def _finish(self) -> list[Tensor]:
        return []

    def _input(self, frames: Tensor) -> Tensor:
        """Resizes and normalizes uint8 (n, 3, H, W) to (n, 3, h, w), bicubic and without antialias as published."""
        pixels = frames.to(self.device, torch.float32).div(255)
        pixels = F.interpolate(pixels, self.network_size, mode="bicubic", align_corners=False)
        mean, std = (pixels.new_tensor(each).view(3, 1, 1) for each in (self.mean, self.std))
        return ((pixels - mean) / std).to(self.dtype)

    def _output(self, maps: Tensor) -> Tensor:
        """Resizes maps (n, h, w) to float32 (n, H, W)."""
        return F.interpolate(maps.float()[:, None], self.size, mode="bilinear", align_corners=True)[:, 0]

    def _stacked(self, maps: list[Tensor]) -> Tensor:
        return torch.stack(maps).cpu() if maps else torch.empty(0, *self.size)


class FrameDepth(DepthStream):
    """Maps of single frames, independent of each other."""

    def _push(self, frames: Tensor) -> list[Tensor]:
        maps = self.model(frames) if isinstance(self.model, DepthAnything) else self.model(frames[:, :, None])[:, 0]
        return list(self._output(maps))


class StatefulDepth(DepthStream):
    """Maps of a video model frame by frame from its state: that of the scan, or the attention's cache of frames."""

    model: VideoDepthAnything

    def __init__(self, model: VideoDepthAnything, size: tuple[int, int], input_size: int = 518):
        super().__init__(model, size, input_size)
        self._state: Any = None

    def _push(self, frames: Tensor) -> list[Tensor]:
        maps = []
        for frame in frames:
            found, self._state = self.model.step(frame[None], self._state)
            maps.append(self._output(found)[0])
        return maps

    def state_dict(self) -> dict[str, Any]:
        return {"_state": self._state}


class WindowedDepth(DepthStream):
    """Maps of overlapping windows, each aligned to the one before it by a scale and a shift.

    A window begins with keyframes of the previous window, the first frame of the video among them; then follow new
    frames. Least squares over the maps of keyframes yields scale and shift; metric maps are not aligned.

    Args:
        latency: ``None``: windows as published. 22 new frames each; the first two keyframes define the alignment, and
            the maps of the eight others are blended with those of the previous window. A number n: a window has n new
            frames after the first frame of the video and the newest ones before them, all of which define the
            alignment, and maps are final at once: at most n - 1 frames of delay, at 32 / n times the cost.
    """

    model: VideoDepthAnything

    def __init__(
        self, model: VideoDepthAnything, size: tuple[int, int], input_size: int = 518, latency: int | None = None
    ):
        super().__init__(model, size, input_size)
        if latency is not None and not 1 <= latency < WINDOW:
            raise ValueError(f"latency={latency} must be 1 to {WINDOW - 1} frames, or null for the published windows.")
        self.latency = latency
        self._frames: list[Tensor] = []  # new frames of the next window
        self._kept: list[Tensor] = []  # keyframes of the previous window
        self._references: list[Tensor] = []  # their aligned maps, or those of the first of them
        self._pending: list[Tensor] = []  # maps that the next window will blend
        self._received = self._windows = 0

    @property
    def _missing(self) -> int:
        """Number of new frames of the next window."""
        if self.latency is not None:
            return self.latency
        return WINDOW - len(self._kept)

    def _push(self, frames: Tensor) -> list[Tensor]:
        maps = []
        for frame in frames:
            self._frames.append(frame)
            self._received += 1
            if len(self._frames) == self._missing:
                maps += self._window()
        return maps

    def _finish(self) -> list[Tensor]:
        if self.latency is not None:
            return self._window() if self._frames else []
        step, maps = WINDOW - len(KEYFRAMES), []
        total = -(-self._received // step)  # published: a window starts at every multiple of 22 below the frame count
        surplus = max(0, total * step + len(KEYFRAMES) - self._received) if total else 0
        last = self._frames[-1:] or self._kept[-1:]
        while self._windows < total:
            self._frames += last * (self._missing - len(self._frames))
            maps += self._window()
        maps += self._pending
        self._pending = []
        return maps[: len(maps) - surplus]

    def _window(self) -> list[Tensor]:
        """Evaluates a window; returns the maps that became final."""
        inputs = self._kept + self._frames
        maps = self._output(self.model(torch.stack(inputs, dim=1)[None])[0])
        if self._references and self.model.max_depth is None:
            given = torch.stack(self._references).flatten()[None]
            found = maps[: len(self._references)].flatten()[None]
            scale, shift = least_squares_alignment(found, given, torch.ones_like(given, dtype=torch.bool))
            maps = (maps * scale + shift).clamp(min=0)
        old = len(self._kept)
        blended = _blend(self._pending, list(maps[old - len(self._pending) : old]))
        new = list(maps[old:])
        if self.latency is None:
            keep: Sequence[int] = KEYFRAMES
            self._pending, final = new[-BLENDED:], blended + new[:-BLENDED]
            self._references = [*(self._references or new)[:1], maps[keep[1]]]
        else:
            oldest = len(inputs) - (WINDOW - self.latency - 1)
            keep, final, known = (0, *range(max(1, oldest), len(inputs))), new, self._references + new
            self._references = [known[index] for index in keep]
        self._kept, self._frames = [inputs[index] for index in keep], []
        self._windows += 1
        return final

    def state_dict(self) -> dict[str, Any]:
        lists = {name: list(getattr(self, name)) for name in ("_frames", "_kept", "_references", "_pending")}
        return {**lists, "_received": self._received, "_windows": self._windows}


def depth_stream(
    model: nn.Module, size: tuple[int, int], input_size: int = 518, mode: Mode = "auto", latency: int = 4
) -> DepthStream:
    """Returns a stream of maps of a model.

    Args:
        model: a :class:`~blueberry_video.models.depth_anything.model.DepthAnything` or
            :class:`~blueberry_video.models.depth_anything.video.VideoDepthAnything` in evaluation mode.
        size: (H, W) of frames and maps, in pixels.
        input_size: shorter side at the input of the network, in pixels.
        mode: ``frames``: every frame alone; ``stream``: video models, frame by frame from a state; ``windows``: the
            published windows of 32 frames, for the attention head; ``sliding``: windows with a delay of less than
            ``latency`` frames; ``auto``: ``frames`` for image models, ``windows`` for the attention head, and otherwise
            ``stream``.
        latency: new frames of a window in mode ``sliding``, 1 to 31.

    Raises:
        ValueError: for an unknown mode, or one that does not fit the model.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown: choose one of {', '.join(MODES)}.")
    if not isinstance(model, VideoDepthAnything):
        if mode not in ("auto", "frames"):
            raise ValueError(f"mode={mode!r} requires a video model, but this one is of images: use mode='frames'.")
        return FrameDepth(model, size, input_size)
    if mode == "auto":
        mode = "stream" if model.streams_exactly else "windows"
    if mode == "frames":
        return FrameDepth(model, size, input_size)
    if mode == "stream":
        return StatefulDepth(model, size, input_size)
    return WindowedDepth(model, size, input_size, latency if mode == "sliding" else None)


def depth_maps(
    model: nn.Module,
    frames: Iterable[Tensor],
    input_size: int = 518,
    mode: Mode = "auto",
    latency: int = 4,
    batch_size: int = 8,
) -> Iterator[Tensor]:
    """Yields the map of each frame of a video; neither frames nor maps are kept.

    Args:
        frames: uint8 (3, H, W) RGB, all of one size, for example decoded one after the other.
        model, input_size, mode, latency: see :func:`depth_stream`.
        batch_size: frames that the model receives at once.

    Returns:
        Iterator over float32 (H, W), one per frame, in order.

    Raises:
        ValueError: see :func:`depth_stream` and :meth:`DepthStream.push`.
    """
    stream: DepthStream | None = None
    waiting = []
    for frame in frames:
        stream = stream or depth_stream(model, (frame.shape[1], frame.shape[2]), input_size, mode, latency)
        waiting.append(frame)
        if len(waiting) == batch_size:
            yield from stream.push(torch.stack(waiting))
            waiting = []
    if stream is not None:
        if waiting:
            yield from stream.push(torch.stack(waiting))
        yield from stream.finish()


def _blend(old: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    """Blends maps linearly, from the first old to the last new one."""
    weights = [index / max(1, len(old) - 1) for index in range(len(old))]
    return [(1 - weight) * a + weight * b for weight, a, b in zip(weights, old, new, strict=True)]
