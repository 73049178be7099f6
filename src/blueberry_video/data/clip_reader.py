"""Reading of videos as clips of a fixed format, for models that are used on files.

Shapes: B clips of T x H x W pixels; N tokens of D channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from blueberry_video.video.clip import FrameReader, with_reader
from blueberry_video.video.decode import DecodeOptions, Frames
from blueberry_video.video.resize import ResizeOptions, resize_to, video_size
from blueberry_video.video.sampling import ClipSampling, choose_clip
from blueberry_video.video.source import open_source
from blueberry_video.video.times import time_range

Result = TypeVar("Result")


class ClipReader(ABC):
    """Base class of models that sample, decode and resize videos to the clips that they receive.

    A subclass sets ``sampling`` and ``resize``, and defines :meth:`encode` and :meth:`patches`.

    Attributes:
        sampling: arguments of :class:`~blueberry_video.video.sampling.ClipSampling`.
        resize: arguments of :class:`~blueberry_video.video.resize.ResizeOptions`.
        decoding: arguments of :class:`~blueberry_video.video.decode.DecodeOptions`.
        device, dtype: of the batches.
    """

    sampling: Mapping[str, Any]
    resize: Mapping[str, Any]
    decoding: Mapping[str, Any] = {}

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @abstractmethod
    def encode(self, clips: Sequence[Frames]) -> Tensor:
        """Returns the tokens (B, N, D) of the encoder for B clips, in (t, h, w) raster order."""

    @abstractmethod
    def patches(self, height: int, width: int) -> tuple[int, int]:
        """Returns the number of tokens (h, w) of a frame of this size in pixels."""

    def read(
        self, source: Any, start: float | None = None, end: float | None = None, views: int | None = 1
    ) -> list[Frames]:
        """Samples, decodes and resizes the clips of a video.

        Args:
            source: a path, URL, bytes, array, tensor or list of frames, see
                :func:`~blueberry_video.video.source.open_source`.
            start, end: seconds after the first frame, between which frames are sampled; ``None``: of the whole video.
            views: evenly spaced clips, of runs with ``sampler=multi_clip``; ``None`` for as many as in validation.

        Returns:
            For each view, frames with ``pixels`` uint8 (T, 3, H, W).

        Raises:
            FileNotFoundError, VideoError, ValueError: see :func:`~blueberry_video.video.clip.load_clip`.
        """
        return self.over(source, lambda duration: [(start, end)], list, views)[0]

    def over(
        self,
        source: Any,
        ranges: Callable[[float], Sequence[tuple[float | None, float | None]]],
        function: Callable[[list[Frames]], Result],
        views: int | None = 1,
    ) -> list[Result]:
        """Returns ``function`` of the clips of each range of seconds of a video, which is opened once.

        Args:
            source, views: see :meth:`read`.
            ranges: the duration in seconds -> (start, end) of each range.
            function: receives the clips of a range, one per view.
        """
        sampling = ClipSampling(**self.sampling)
        if sampling.sampler == "multi_clip":
            sampling = replace(sampling, num_clips=views or sampling.num_clips)
        resize = ResizeOptions(**self.resize)

        def clip(reader: FrameReader, first: int, last: int, view: int) -> Frames:
            chosen = choose_clip(reader.info.timestamps[first : last + 1], sampling, window=view)
            aspect, indices = reader.info.picture.pixel_aspect, [first + index for index in chosen]
            size = video_size(reader.info.height, reader.info.width, len(chosen), resize, pixel_aspect=aspect)
            return reader.load(indices, partial(resize_to, size=size, options=resize, pixel_aspect=aspect))

        def work(reader: FrameReader) -> list[Result]:
            found = []
            for start, end in ranges(reader.info.duration):
                bounds = time_range(reader.info.timestamps, start, end, reader.info.duration)
                count = sampling.num_clips if sampling.sampler == "multi_clip" else 1
                found.append(function([clip(reader, *bounds, view) for view in range(count)]))
            return found

        with open_source(source) as opened:
            return with_reader(opened, DecodeOptions(**self.decoding), work)

    def batch(self, clips: Sequence[Frames], names: Sequence[str]) -> dict[str, Any]:
        """Returns a batch of clips on the device: ``video`` float (B, 3, T, H, W) in [0, 1], ``id``, ``frames``."""
        video = torch.stack([clip.pixels for clip in clips]).transpose(1, 2).to(self.device)
        frames = torch.tensor([clip.indices for clip in clips], device=self.device)
        batch = {"video": video.to(self.dtype).div(255), "id": list(names)}
        return batch | ({"frames": frames} if self.sampling["sampler"] == "segments" else {})

    def features(self, *sources: Any) -> Tensor:
        """Returns the tokens (B, N, D) of the encoder for one clip of each of B videos, see :meth:`read`."""
        return self.encode([self.read(source)[0] for source in sources])


def name_of(source: Any) -> str:
    """Returns the path of a video, or the type of another source."""
    return str(source) if isinstance(source, str | Path) else type(source).__name__
