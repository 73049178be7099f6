"""Clips of the episodes of a robot, with actions and states, in the formats v3.0 and v2.1 of LeRobot."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from blueberry_video.data.lerobot_tables import Episode, LeRobotTables, episodes_of
from blueberry_video.data.metadata import Row
from blueberry_video.data.video_folder import VideoClips
from blueberry_video.video.clip import FrameReader, with_reader
from blueberry_video.video.container import OpenVideo, VideoInfo, open_video
from blueberry_video.video.decode import BACKENDS, Frames
from blueberry_video.video.errors import BrokenVideoError, VideoError
from blueberry_video.video.resize import resize_to, video_size
from blueberry_video.video.sampling import choose_clip

MAX_DISTANCE = 0.25  # of a frame to its timestamp, in units of the interval of frames
_MAX_OPEN = 8  # files per process: the packets of a long file are indexed once


@dataclass(frozen=True)
class EpisodeRow(Row):
    """Row of an episode.

    Attributes:
        start, length: rows in the tables.
        seconds: start of the episode in the file.
    """

    start: int = 0
    length: int = 0
    seconds: float = 0.0


class LeRobotEpisodes(VideoClips):
    """Map-style dataset of clips of episodes: ``video`` uint8 (T, 3, H, W), ``actions`` float32 (T-1, A), ``states``
    float32 (T, S), ``caption``, the task, ``id`` and ``fps``.

    ``actions[t]`` is the action recorded with frame t of the clip. With a ``stride`` above 1, actions of frames between
    those of a clip are left out.

    Args:
        root: folder with ``meta/``, ``data/`` and ``videos/``.
        num_frames, sampler, stride, fps, num_clips, image_size, resize, pad: see ``VideoFolder``; of the frames of an
            episode.
        camera: feature of the videos, as ``observation.images.top``; None for the only one.
        actions, states: features of the actions and states; None omits them.
        split: of ``meta/info.json``; None uses all episodes.
        episodes: range of episodes, without its last number, as ``0:45`` or ``45:``; instead of ``split``.
        backends, max_broken_share, skipped_file, seed: see ``VideoFolder``.
        tone_map, square_pixels, deinterlace, antialias: see ``VideoFolder``.

    Raises:
        FileNotFoundError: no data set at root, or an incomplete one.
        ImportError: pyarrow is not installed.
        ValueError: another version, no such feature, split or episode, or tables that do not agree.
        RuntimeError: (when reading a clip) more than ``max_broken_share`` of the episodes are broken.
    """

    def __init__(
        self,
        root: str | Path,
        num_frames: int,
        sampler: Literal["uniform", "random", "fixed_fps", "multi_clip", "segments"] = "random",
        stride: int = 1,
        fps: float | None = None,
        num_clips: int = 1,
        image_size: int | Sequence[int] | None = None,
        resize: Literal["crop", "stretch"] = "crop",
        pad: bool = False,
        camera: str | None = None,
        actions: str | None = "action",
        states: str | None = "observation.state",
        split: str | None = None,
        episodes: str | None = None,
        backends: Sequence[str] = BACKENDS,
        max_broken_share: float = 0.05,
        skipped_file: str | None = None,
        seed: int = 0,
        tone_map: Literal["none", "bt2390", "hable"] = "none",
        square_pixels: bool = False,
        deinterlace: Literal["none", "bwdif", "yadif"] = "none",
        antialias: bool = True,
    ):
        one_crop: Literal[1, 3] = 1
        how = (sampler, stride, fps, num_clips, one_crop, image_size, resize, pad)
        rendering = (tone_map, square_pixels, deinterlace)
        super().__init__(root, num_frames, *how, backends, *rendering, max_broken_share, skipped_file, seed, antialias)
        features = {key: name for key, name in (("actions", actions), ("states", states)) if name is not None}
        self.tables = LeRobotTables(self.root, camera, list(dict.fromkeys(features.values())))
        self.features = features
        self.classes, self.reversal_pairs = {}, {}
        found = episodes_of(self.tables, split, episodes)
        self.rows = [self._row(episode) for episode in found]
        self._files: tuple[int, OrderedDict[Path, OpenVideo]] = os.getpid(), OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": (0, OrderedDict())}

    @property
    def cache_key(self) -> str:
        digest = hashlib.sha256()
        for row in self.rows:
            assert isinstance(row, EpisodeRow)
            digest.update(np.array([row.start, row.length, row.seconds]).tobytes())
        for name in self.features.values():
            digest.update(self.tables.values[name].tobytes())
        return f"lerobot-1/{self.tables.camera}/{sorted(self.features)}/{digest.hexdigest()}/{super().cache_key}"

    def _row(self, episode: Episode) -> EpisodeRow:
        name, task = f"episode_{episode.number:06d}", self.tables.task(episode.start)
        return EpisodeRow(name, episode.path, task, {}, None, episode.start, episode.length, episode.seconds)

    def _load(self, row: Row, clip: int, epoch: int) -> Frames:
        """Frames of a clip, with their positions in the episode as ``indices``."""
        assert isinstance(row, EpisodeRow)

        def work(reader: FrameReader) -> Frames:
            positions = _frames_at(reader.info, self._seconds(row), self.tables.fps, row.name)
            chosen = choose_clip(reader.info.timestamps[positions], self.sampling, self._rng(row, epoch), clip)
            size = video_size(reader.info.height, reader.info.width, len(chosen), self._size)
            frames = reader.load([int(positions[i]) for i in chosen], partial(resize_to, size=size, options=self._size))
            return replace(frames, indices=tuple(chosen))

        try:
            return work(FrameReader.of_video(self._opened(row.path), self.decoding))
        except VideoError:
            self._files[1].pop(row.path, None)
            return with_reader(row.path, self.decoding, work)

    def _along(self, row: Row, frames: Frames) -> dict:
        assert isinstance(row, EpisodeRow)
        at = row.start + np.array(frames.indices)
        found = {key: torch.from_numpy(self.tables.values[name][at]) for key, name in self.features.items()}
        return {key: values[:-1] if key == "actions" else values for key, values in found.items()}

    def _seconds(self, row: EpisodeRow) -> np.ndarray:
        """Seconds in the file of every frame of an episode, float64 (length,)."""
        return row.seconds + self.tables.timestamps[row.start : row.start + row.length]

    def _opened(self, path: Path) -> OpenVideo:
        """Open file, which stays open: its packet index is as long as all of its episodes."""
        if self._files[0] != os.getpid():  # a worker must not share the position of a file with its parent
            self._files = os.getpid(), OrderedDict()
        files = self._files[1]
        if path not in files:
            files[path] = open_video(path, num_threads=self.decoding.num_threads)
            if len(files) > _MAX_OPEN:
                files.popitem(last=False)[1].container.close()
        files.move_to_end(path)
        return files[path]


def _frames_at(info: VideoInfo, seconds: np.ndarray, fps: float, name: str) -> np.ndarray:
    """Returns the frames of a file with these timestamps.

    Raises:
        BrokenVideoError: the nearest frame to one of them is further away than ``MAX_DISTANCE``, or the same as for
            the timestamp before it.
    """
    times = info.timestamps
    right = np.searchsorted(times, seconds).clip(1, len(times) - 1) if len(times) > 1 else np.zeros(len(seconds), int)
    left = np.maximum(right - 1, 0)
    nearest = np.where(seconds - times[left] <= times[right] - seconds, left, right)
    distance = np.abs(times[nearest] - seconds)
    repeated = np.diff(nearest, prepend=-1) < 1
    if (wrong := np.flatnonzero((distance > MAX_DISTANCE / fps) | repeated)).size:
        at = int(wrong[0])
        raise BrokenVideoError(
            f"{info.name} has no frame at {seconds[at]:.4f} s, frame {at} of {name}: the nearest is at "
            f"{times[nearest[at]]:.4f} s, and the file has {len(times)} frames up to {times[-1]:.4f} s. Copy or "
            "convert the data set again."
        )
    return nearest
