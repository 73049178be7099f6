"""Scenes of a video, between hard cuts, and the streams of a file.

    for scene in find_scenes("film.mp4"):
        process_video("film.mp4", video_start=scene.start, video_end=scene.end)

A cut is a frame that differs from the one before it by more than a threshold and by several times the median of its
neighborhood, so that fast motion is not a cut. Fades are not found.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import torch
from torch import Tensor

from blueberry_video.video.clip import CANDIDATE_SIDE, FrameReader, check_decoded, with_reader
from blueberry_video.video.container import PYAV_OPTIONS
from blueberry_video.video.decode import DecodeOptions
from blueberry_video.video.errors import BrokenVideoError
from blueberry_video.video.extent import find_cut
from blueberry_video.video.process import Hooks, VideoProcessor
from blueberry_video.video.ranges import check_above_zero, check_at_least
from blueberry_video.video.resize import resize
from blueberry_video.video.sampling import change_scores
from blueberry_video.video.settings import VideoSettings, load_settings
from blueberry_video.video.source import open_source
from blueberry_video.video.source_options import SourceOptions

_NEAR = 8  # frames on each side of which the median change is taken
_TIMES = 3.0  # a cut exceeds that median this many times


@dataclass(frozen=True)
class Scene:
    """Scene of a video: its first and last frame, and their seconds after the first frame of the video."""

    first: int
    last: int
    start: float
    end: float


def find_scenes(
    source: Any,
    threshold: float = 0.08,
    min_seconds: float = 0.5,
    options: SourceOptions | None = None,
    decode: DecodeOptions | None = None,
) -> list[Scene]:
    """Returns the scenes of a video in order; together they hold every frame.

    Decodes every frame, with a few in memory at a time, at 160 pixels.

    Args:
        source: see ``source.open_source``.
        threshold: change of a cut, as ``sampling.change_scores``: 0 to 1.
        min_seconds: shorter scenes are joined to the one before.
        options, decode: limits and decoders.

    Raises:
        VideoError: as :func:`process_video`.
        ValueError: a threshold or duration that is not above 0.
    """
    check_above_zero(True, threshold=threshold)
    check_at_least(0, min_seconds=min_seconds)
    limits, decoding = options or SourceOptions(), decode or DecodeOptions()

    def work(reader: FrameReader) -> list[Scene]:
        info = reader.info
        everything = range(info.num_frames)
        check_decoded(info, everything, limits.max_decoded_pixels)
        scale = min(1.0, CANDIDATE_SIDE / max(info.height, info.width))
        size = (max(1, round(info.height * scale)), max(1, round(info.width * scale)))
        times = info.timestamps - info.timestamps[0]
        return split(_changes(reader, everything, size), times, threshold, min_seconds, info.duration)

    with open_source(source, limits) as opened:
        return with_reader(opened, decoding, work, limits.max_frame_pixels)


def split(
    changes: np.ndarray, times: np.ndarray, threshold: float, min_seconds: float, duration: float | None = None
) -> list[Scene]:
    """Returns the scenes between the cuts of a video with ``changes`` (N,) from frame to frame at ``times`` (N,), which
    begin at 0. The last scene ends at ``duration``, or with the start of the last frame if that is None."""
    starts = [0]
    for i in np.flatnonzero(changes > threshold).tolist():
        near = np.delete(changes[max(1, i - _NEAR) : i + _NEAR + 1], i - max(1, i - _NEAR))
        usual = float(np.median(near)) if len(near) else 0.0
        if changes[i] > _TIMES * usual and times[i] - times[starts[-1]] >= min_seconds:
            starts.append(i)
    end = times[-1] if duration is None else duration
    if len(starts) > 1 and end - times[starts[-1]] < min_seconds:
        starts.pop()
    lasts = [start - 1 for start in starts[1:]] + [len(times) - 1]
    return [Scene(a, b, float(times[a]), float(times[b])) for a, b in zip(starts, lasts)]


def video_streams(source: Any, options: SourceOptions | None = None) -> list[int]:
    """Returns the indices of the video streams of a file, without cover art. Raises as :func:`process_video`."""
    with open_source(source, options) as opened:
        if opened.path is None:
            return [0]
        try:
            with av.open(str(opened.path), options=PYAV_OPTIONS) as container:
                pictures = av.stream.Disposition.attached_pic
                return [stream.index for stream in container.streams.video if not stream.disposition & pictures]
        except av.error.FFmpegError as error:
            cut = find_cut(opened.path, opened.container or "")
            found = f"is {cut}. It cannot be opened ({error})." if cut else f"cannot be opened ({error}): re-encode it."
            raise BrokenVideoError(f"{opened.name} {found}") from error


def process_streams(
    source: Any,
    model: str | Path | None = "qwen2.5-vl",
    hooks: Hooks | None = None,
    streams: Sequence[int] | None = None,
    **overrides: Any,
) -> dict[int, Any]:
    """Processes several video streams of one file, such as the views of a stereo or dash camera.

    Args:
        source, model, hooks, overrides: as :func:`process_video`.
        streams: indices in the file; all video streams if None.

    Returns:
        Index of the stream → return value of ``process_video`` with ``stream_index``.
    """
    general: VideoSettings = load_settings(model, overrides)
    limits = general.source
    with open_source(source, limits) as opened:
        local: Any = opened.path if opened.path is not None else source
        chosen = video_streams(local, limits) if streams is None else streams
        if opened.path is None:
            return {0: VideoProcessor(general, hooks)(local)}
        found = {}
        for index in chosen:
            settings: VideoSettings = load_settings(model, {**overrides, "stream_index": index})
            found[index] = VideoProcessor(settings, hooks)(local)
        return found


def _changes(reader: FrameReader, indices: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """Change of each frame to the one before; 0 for the first."""
    before: Tensor | None = None
    parts: list[Tensor] = []
    for small in _small(reader, indices, size):
        joined = small if before is None else torch.cat([before, small])
        parts.append(change_scores(joined)[0 if before is None else 1 :])
        before = small[-1:]
    return cast(Tensor, torch.cat(parts)).numpy()


def _small(reader: FrameReader, indices: Sequence[int], size: tuple[int, int]) -> Iterator[Tensor]:
    for chunk in reader.read(indices, reader.chunk_frames):
        yield resize(chunk.pixels, size, "fast", "bilinear").contiguous()
