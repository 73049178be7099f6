"""Open, sample, decode and resize a video in one call.

    from blueberry_video.video import load_clip
    clip = load_clip("a.mp4", ClipSampling("uniform", num_frames=16), ResizeOptions(rule="crop", image_size=224))
    clip.pixels, clip.timestamps  # uint8 (16, 3, 224, 224), float64 (16,) seconds

Datasets call ``load_clip``. ``VideoProcessor`` calls the same steps (``with_reader``, ``FrameReader.sample``,
``FrameReader.load``) and fits the number and size of frames into its budgets between sampling and decoding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from blueberry_video.video.container import MAX_FRAME_PIXELS, OpenVideo, VideoInfo
from blueberry_video.video.decode import DecodeOptions, Frames, decode_in_chunks, in_order, with_fallbacks
from blueberry_video.video.errors import LimitError
from blueberry_video.video.frame_list import FrameList
from blueberry_video.video.quality import Stopwatch
from blueberry_video.video.refinement import finer
from blueberry_video.video.resize import ResizeOptions, resize, resize_to, video_size
from blueberry_video.video.sampling import (
    DEFAULT_FPS,
    ClipSampling,
    SamplingOptions,
    candidate_frames,
    change_scores,
    choose,
    choose_clip,
    spread,
)
from blueberry_video.video.source import Source

CHUNK_BYTES = 2**27  # decoded frames in memory at a time
LIST = "frames"  # kind of a source that is a list of frames
CANDIDATE_SIDE = 160  # pixels of the longer side of the frames that scores are computed on
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class FrameReader:
    """Frames of one open video.

    Attributes:
        info: frame count, timestamps, keyframes and size.
        read: (ascending distinct frame indices, frames per chunk) → chunks of decoded frames.
        chunk_frames: frames to decode before they are resized; fewer where frames are large.
    """

    info: VideoInfo
    read: Callable[[Sequence[int], int], Iterator[Frames]]
    chunk_frames: int

    @classmethod
    def of_video(cls, video: OpenVideo, options: DecodeOptions) -> "FrameReader":
        """Reader of an open file."""

        def read(indices: Sequence[int], chunk_frames: int) -> Iterator[Frames]:
            return decode_in_chunks(video, indices, replace(options, chunk_frames=chunk_frames))

        return cls(video.info, read, _chunk_frames(video.info, options))

    @classmethod
    def of_frames(cls, source: Source, options: DecodeOptions) -> "FrameReader":
        """Reader of a source of decoded frames or still images."""
        frames, info = cast(FrameList, source.frames), _frames_info(source)

        def read(indices: Sequence[int], chunk_frames: int) -> Iterator[Frames]:
            for start in range(0, len(indices), chunk_frames):
                part = tuple(indices[start : start + chunk_frames])
                times = torch.from_numpy(info.timestamps[list(part)])
                unset = torch.zeros(len(part), dtype=torch.bool)
                yield Frames(frames.read(part), part, times, unset, unset, "frames")

        return cls(info, read, _chunk_frames(info, options))

    def sample(
        self,
        sampling: SamplingOptions | ClipSampling,
        rng: np.random.Generator | None = None,
        window: int = 0,
        score: Callable[[Tensor], Tensor] | None = None,
        max_decoded_pixels: float = float("inf"),
    ) -> list[int]:
        """Returns the frame indices that ``sampling`` selects.

        Args:
            sampling: the frames to take.
            rng, window: see ``choose_clip``; ignored for ``SamplingOptions``.
            score: candidate frames uint8 (N, 3, h, w) → scores (N,) of ``adaptive``; ``change_scores`` if None.
            max_decoded_pixels: limit on the candidate frames of ``sampling="adaptive"``.

        Raises:
            ValueError, VideoError: as ``choose`` and ``choose_clip``.
            LimitError: more candidate pixels than ``max_decoded_pixels``.
        """
        info = self.info
        if isinstance(sampling, ClipSampling):
            return choose_clip(info.timestamps, sampling, rng, window)
        counted = sampling.num_frames is not None or sampling.indices is not None
        whole = info.fps == 0 or (is_list(info) and sampling.frame_lists == "whole")
        if whole and sampling.sampling == "fps" and not counted:
            sampling = replace(sampling, sampling="all", fps=None)
            if info.num_frames > sampling.max_frames:
                sampling = replace(sampling, sampling="uniform", num_frames=sampling.max_frames)
        keyframes = info.keyframes.tolist()
        if sampling.sampling == "progressive" and sampling.indices is None:
            return self._in_rounds(sampling, score or change_scores, max_decoded_pixels)
        if sampling.sampling != "adaptive" or sampling.indices is not None:
            return choose(info.timestamps, sampling, keyframes, duration=info.duration)
        candidates = sorted(set(candidate_frames(info.timestamps, sampling, duration=info.duration)))
        check_decoded(info, candidates, max_decoded_pixels)
        scores = (score or change_scores)(self._small(candidates))
        return choose(info.timestamps, sampling, keyframes, scores, duration=info.duration)

    def _in_rounds(
        self, sampling: SamplingOptions, score: Callable[[Tensor], Tensor], max_decoded_pixels: float
    ) -> list[int]:
        """Frames of ``progressive``: the coarse ones first, then others between those that differ most."""
        even = choose(self.info.timestamps, replace(sampling, sampling="fps"), duration=self.info.duration)
        wanted = sorted(set(even))
        check_decoded(self.info, wanted, max_decoded_pixels)
        coarse = max(2, len(wanted) >> (sampling.rounds - 1))
        taken = sorted({wanted[i] for i in spread(0, len(wanted) - 1, min(coarse, len(wanted)), "linspace")})
        small = dict(zip(taken, self._small(taken)))
        while len(taken) < len(wanted):
            changes = score(torch.stack([small[i] for i in taken]))[1:].tolist()
            extra = min(len(taken), len(wanted) - len(taken))  # a round doubles the frames
            if not (added := finer(taken, changes, extra)):
                break
            small |= zip(added, self._small(added))
            taken = sorted([*taken, *added])
        return taken + [taken[-1]] * (len(even) - len(taken))

    def _small(self, indices: Sequence[int]) -> Tensor:
        """Frames of at most ``CANDIDATE_SIDE`` pixels per side, uint8 (n, 3, h, w)."""
        scale = min(1.0, CANDIDATE_SIDE / max(self.info.height, self.info.width))
        size = (max(1, round(self.info.height * scale)), max(1, round(self.info.width * scale)))
        chunks = self.read(indices, self.chunk_frames)
        return torch.cat([resize(chunk.pixels, size, "fast", "bilinear").contiguous() for chunk in chunks])

    def load(
        self,
        indices: Sequence[int],
        resize: Callable[[Tensor], Tensor] | None = None,
        chunk_frames: int | None = None,
        watch: Stopwatch | None = None,
        on_chunk: Callable[[int, int], None] | None = None,
    ) -> Frames:
        """Decodes frames and resizes them chunk by chunk, so that memory holds the resized frames only. Raises as
        :func:`decode_in_chunks`, and what ``resize`` and ``on_chunk`` raise.

        Args:
            indices: frame indices in any order; repetitions are decoded once.
            resize: applied to each chunk, uint8 (n, 3, H, W) → uint8 (n, 3, h, w); None keeps the size.
            chunk_frames: frames per chunk; ``self.chunk_frames`` if None.
            watch: receives the seconds of ``decode`` and ``resize``.
            on_chunk: called with (frames done, frames in total) after each chunk.

        Returns:
            Frames in the order of ``indices``, ``pixels`` contiguous on the CPU, ``backend`` of the last chunk.
        """
        wanted, watch, done = sorted(set(indices)), watch or Stopwatch(), 0
        masks = torch.zeros(2, len(wanted), dtype=torch.bool)
        chunks = self.read(wanted, chunk_frames or self.chunk_frames)
        while done < len(wanted):
            with watch.stage("decode"):
                chunk = next(chunks)
            with watch.stage("resize"):
                resized = resize(chunk.pixels) if resize else chunk.pixels
                if done == 0:
                    pixels = torch.empty(len(wanted), *resized.shape[1:], dtype=torch.uint8)
                rows = slice(done, done + len(chunk.indices))
                pixels[rows] = resized
                masks[:, rows] = torch.stack((chunk.missing, chunk.suspect))
            done += len(chunk.indices)
            if on_chunk:
                on_chunk(done, len(wanted))
        times = torch.from_numpy(self.info.timestamps[wanted])
        reports = (chunk.backend, chunk.failures, chunk.damage)
        frames = Frames(pixels, tuple(wanted), times, masks[0], masks[1], *reports)
        return in_order(frames, indices)


def load_clip(
    source: str | Path | Source,
    sampling: SamplingOptions | ClipSampling,
    resize: ResizeOptions | None = None,
    decode: DecodeOptions | None = None,
    rng: np.random.Generator | None = None,
    window: int = 0,
) -> Frames:
    """Opens a video, samples frames, decodes and resizes them.

    Args:
        source: path of a local file, or an open source.
        sampling: the frames to take.
        resize: their size; the size of the video if None.
        decode: backends and fallbacks; the defaults if None.
        rng, window: see ``choose_clip``.

    Returns:
        ``Frames`` with ``pixels`` uint8 (T, 3, H, W).

    Raises:
        FileNotFoundError, RefusedSourceError, BrokenVideoError: as ``decode.decode``.
        ValueError: frames that the video does not have, or a size that the rule refuses.
    """

    def work(reader: FrameReader) -> Frames:
        indices = reader.sample(sampling, rng, window)
        if resize is None:
            return reader.load(indices)
        aspect = reader.info.picture.pixel_aspect
        size = video_size(reader.info.height, reader.info.width, len(indices), resize, pixel_aspect=aspect)
        return reader.load(indices, partial(resize_to, size=size, options=resize, pixel_aspect=aspect))

    return with_reader(source, decode or DecodeOptions(), work)


def with_reader(
    source: str | Path | Source,
    options: DecodeOptions,
    work: Callable[[FrameReader], Result],
    max_frame_pixels: int = MAX_FRAME_PIXELS,
) -> Result:
    """Runs ``work`` on a reader of the source, with the fallbacks of :func:`with_fallbacks`; ``work`` may therefore run
    more than once."""
    if isinstance(source, Source) and source.frames is not None:
        return work(FrameReader.of_frames(source, options))

    def on_file(video: OpenVideo, current: DecodeOptions) -> Result:
        return work(FrameReader.of_video(video, current))

    path, name = (cast(Path, source.path), source.name) if isinstance(source, Source) else (source, None)
    return with_fallbacks(path, options, on_file, max_frame_pixels, name)


def is_list(info: VideoInfo) -> bool:
    """Checks whether a video is a list or folder of frames, which are usually sampled already."""
    return info.codec == LIST


def shown_times(info: VideoInfo, indices: Sequence[int], sampling: SamplingOptions) -> np.ndarray:
    """Returns the seconds of frames after the first frame of the video, float64 (n,).

    The repetitions of the last frame that fill a token continue at the rate of the frames in a list, as in
    qwen-vl-utils; in a file they have the time of that frame.
    """
    times = info.timestamps[list(indices)] - info.timestamps[0]
    if is_list(info) and sampling.indices is None:
        padding = np.maximum(np.arange(len(indices)) - list(indices).index(indices[-1]), 0)
        times = times + padding / (info.fps or DEFAULT_FPS)
    return times


def check_decoded(info: VideoInfo, indices: Sequence[int], max_decoded_pixels: float) -> None:
    """Raises LimitError if frames have more pixels to decode than ``max_decoded_pixels``."""
    count = len(set(indices))
    pixels = count * info.height * info.width
    if pixels > max_decoded_pixels:
        raise LimitError(
            f"{count} frames of {info.name} at {info.width}x{info.height} are {pixels} pixels to decode, above "
            f"max_decoded_pixels={max_decoded_pixels}: take fewer frames, or raise it."
        )


def _chunk_frames(info: VideoInfo, options: DecodeOptions) -> int:
    return max(1, min(options.chunk_frames, CHUNK_BYTES // (3 * info.height * info.width)))


def _frames_info(source: Source) -> VideoInfo:
    """``VideoInfo`` of decoded frames. Where their times are unknown, the rate is 0 and the timestamps are those at two
    frames per second, as in qwen-vl-utils. A single frame of unknown rate is a still image, with a duration of 0."""
    frames = cast(FrameList, source.frames)
    known, fps, last = frames.timestamps, frames.fps, frames.last_duration
    if last is None:
        last = 1 / DEFAULT_FPS if len(frames) > 1 else 0.0
    times = np.arange(len(frames)) / DEFAULT_FPS if known is None else np.array(known, np.float64)
    span = float(times[-1] - times[0])
    return VideoInfo(
        path=Path(source.name),
        name=source.name,
        num_frames=len(frames),
        fps=fps,
        duration=span + last,
        height=frames.size[0],
        width=frames.size[1],
        timestamps=times,
        keyframes=np.arange(len(frames)),
        codec=source.kind,
        pixel_format="rgb24",
        container=source.container or source.kind,
    )
