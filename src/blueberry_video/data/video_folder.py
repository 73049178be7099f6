"""Clips from a folder of video files with captions and labels.

    <root>/videos/*.mp4                      any container that FFmpeg reads; sub-folders allowed
    <root>/metadata.{jsonl,json,csv}         one row a file
    <root>/classes.json                      optional: {"classes": {label: [names]}, "reversal_pairs": {label: [[i,
    j]]}}

See ``read_metadata`` for the rows. Which frames a clip shows is a pure function of (seed, epoch, file name), never of
the worker that decodes it.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from blueberry_video.data.media_folder import MediaFolder
from blueberry_video.data.metadata import VIDEOS, Row, read_classes, read_metadata
from blueberry_video.video import resize as resizing
from blueberry_video.video import sampling
from blueberry_video.video.container import VideoInfo
from blueberry_video.video.decode import BACKENDS, DecodeOptions, decode

SAMPLERS = ("uniform", "random", "fixed_fps", "multi_clip")


class VideoFolder(MediaFolder):
    """Map-style dataset of clips: ``video`` uint8 (T, 3, H, W), ``id``, ``fps`` and, where the metadata has them,
    ``caption``, ``labels``.

    Args:
        root: the folder laid out as above.
        num_frames: T.
        sampler: ``uniform``: spread over the whole video; ``random``: a window of every ``stride``-th frame, at
            another place in each epoch; ``fixed_fps``: frames 1 / ``fps`` s apart, in the middle of the video;
            ``multi_clip``: ``num_clips`` evenly spaced windows of each file, for testing. Each window is an item of
            its own, with id ``name#k``, so that a clip always has the same shape; average what a model says over the
            items whose id is the same before ``#``.
        stride: frames between two of a ``random`` or ``multi_clip`` window.
        fps: frames a second of ``fixed_fps``.
        num_clips: windows a file of ``multi_clip``.
        num_crops: of each ``multi_clip`` window: 1, the centre, or 3 items ``name#<clip>.<crop>``: squares of
            ``image_size`` at the start, the middle and the end of the picture's long side. Neighbouring items share
            one decoding.
        image_size: pixels, one number for a square or (height, width); None keeps each file's size, which must then be
            the same within a batch.
        resize: ``crop`` scales until the picture covers ``image_size`` and cuts out the centre; ``stretch`` changes
            the aspect.
        pad: repeat the last frame of videos that are shorter than the clip, instead of raising.
        metadata: file name below root; None finds the one there is; ``"none"`` serves clips without caption and labels.
        split: only rows whose ``split`` says so; None serves all.
        classes: class names of each label; else those of ``classes.json``; else the sorted values found (over all
            splits).
        backends: decoders in the order in which they are tried.
        max_broken_share: a file that no backend decodes is replaced by the next good one and listed; above this share
            of broken files the run stops.
        skipped_file: csv in which skipped files are listed, shared by all processes of a run; may also be set later.
        seed: seed of the ``random`` windows.
        make: called with root before it is read, to create the folder on first use; must do nothing where it is
            complete.

    Raises:
        FileNotFoundError: no folder, no videos in it, no metadata, or a row without its file.
        ValueError: a file without row, a faulty row, or an argument out of range.
        RuntimeError: (when reading a clip) more than ``max_broken_share`` of the files are broken.
    """

    media = VIDEOS

    def __init__(
        self,
        root: str | Path,
        num_frames: int,
        sampler: Literal["uniform", "random", "fixed_fps", "multi_clip"] = "uniform",
        stride: int = 1,
        fps: float | None = None,
        num_clips: int = 1,
        num_crops: Literal[1, 3] = 1,
        image_size: int | Sequence[int] | None = None,
        resize: Literal["crop", "stretch"] = "crop",
        pad: bool = False,
        metadata: str | None = None,
        split: str | None = None,
        classes: dict[str, Sequence[str]] | None = None,
        backends: Sequence[str] = BACKENDS,
        max_broken_share: float = 0.05,
        skipped_file: str | None = None,
        seed: int = 0,
        make: Callable[[Path], None] | None = None,
    ):
        _check_choices(sampler, stride, fps, num_clips)
        _check_crops(num_crops, sampler, image_size, resize)
        super().__init__(root, image_size, resize, max_broken_share, skipped_file)
        if make is not None:
            make(self.root)
        self.num_frames, self.sampler, self.stride, self.fps, self.pad = num_frames, sampler, stride, fps, pad
        self.num_clips, self.num_crops = num_clips, num_crops
        # one thread, for loaders have many workers; a damaged file is skipped, not salvaged: training repeats it often
        self.decoding = DecodeOptions(backends=tuple(backends), num_threads=1, salvage=False)
        self.seed = seed
        self.varies_by_epoch = sampler == "random"
        named, self.reversal_pairs = read_classes(self.root)
        named = {name: tuple(values) for name, values in (classes or named).items()}
        self.rows, self.classes = read_metadata(self.root, metadata, split, named)
        self._last: tuple[tuple[str, int], tuple[Tensor, float]] | None = None  # (file, clip), and it, of num_crops=3

    def __len__(self) -> int:
        return len(self.rows) * self.num_clips * self.num_crops

    def __getitem__(self, index: int) -> dict:
        return self.sample(index, epoch=0)

    def sample(self, index: int, epoch: int) -> dict:
        """Clip ``index`` as epoch ``epoch`` shows it."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside this dataset of {len(self)} clips.")
        rest, crop = divmod(index, self.num_crops)
        start, clip = divmod(rest, self.num_clips)
        return self._first_good(start, lambda row: self._read(row, clip, crop, epoch))

    @property
    def cache_key(self) -> str:
        """Everything a clip depends on but its index: settings, files with size and modification time, labels and
        captions."""
        settings: list = [
            self.num_frames,
            self.sampler,
            self.stride,
            self.fps,
            self.num_clips,
            self.image_size,
            self.resize,
        ]
        settings += [self.pad, self.decoding.backends, self.seed, *([self.num_crops] if self.num_crops > 1 else [])]
        return f"video-folder-2/{json.dumps(settings)}/{self._digest()}"

    def _read(self, row: Row, clip: int, crop: int, epoch: int) -> dict:
        if self.num_crops == 1:
            pixels, fps = self._clip(row, clip, epoch)
            video, part = self._resized(pixels), f"#{clip}" if self.sampler == "multi_clip" else ""
        else:
            covering, fps = self._covering(row, clip)
            video, part = self._third(covering, crop), f"#{clip}.{crop}"
        return {"video": video, "id": row.name + part, "fps": fps, **self._said(row)}

    def _clip(self, row: Row, clip: int, epoch: int) -> tuple[Tensor, float]:
        """Frames uint8 (T, 3, H, W) in the size of the file, and their frames a second."""
        rng = np.random.default_rng([self.seed, epoch, int(hashlib.sha256(row.name.encode()).hexdigest()[:16], 16)])
        frames = decode(row.path, lambda info: self._choose(info, clip, rng), self.decoding)
        seconds = frames.timestamps.unique()  # without the repetitions of padding
        fps = self.fps or ((len(seconds) - 1) / float(seconds[-1] - seconds[0]) if len(seconds) > 1 else 0.0)
        return frames.pixels, float(fps)

    def _covering(self, row: Row, clip: int) -> tuple[Tensor, float]:
        """A window scaled until ``image_size`` is covered, as ``resize.crop`` does before it cuts; and its frames a
        second. The last one is kept for the item that follows."""
        if self._last is None or self._last[0] != (row.name, clip):
            assert self.image_size is not None
            pixels, fps = self._clip(row, clip, epoch=0)
            scale = max(size / side for size, side in zip(self.image_size, pixels.shape[2:]))
            height, width = (max(round(side * scale), size) for size, side in zip(self.image_size, pixels.shape[2:]))
            covering = resizing.resize(pixels, (height, width), resample="fast", interpolation="bilinear")
            self._last = (row.name, clip), (covering, fps)
        return self._last[1]

    def _third(self, covering: Tensor, crop: int) -> Tensor:
        """``image_size`` of a picture that covers it: 0, 1, 2 at the start, in the middle, at the end."""
        assert self.image_size is not None
        top, left = ((side - size) * crop // 2 for side, size in zip(covering.shape[2:], self.image_size))
        return covering[:, :, top : top + self.image_size[0], left : left + self.image_size[1]].contiguous()

    def _choose(self, info: VideoInfo, clip: int, rng: np.random.Generator) -> list[int]:
        try:
            if self.sampler == "uniform":
                return sampling.uniform(info.num_frames, self.num_frames, self.pad)
            if self.sampler == "random":
                return sampling.random_window(info.num_frames, self.num_frames, rng, self.stride, self.pad)
            if self.sampler == "multi_clip":
                return sampling.windows(info.num_frames, self.num_frames, self.num_clips, self.stride, self.pad)[clip]
            assert self.fps is not None
            return sampling.fixed_fps(info.timestamps.tolist(), self.num_frames, self.fps, pad=self.pad)
        except ValueError as error:
            raise ValueError(
                f"{info.path}: {error} In a config these are model.encoder.num_frames, data.train.stride and "
                "data.train.pad=true (or data.val.…)."
            ) from error


def _check_choices(sampler: str, stride: int, fps: float | None, num_clips: int) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler!r} does not exist: choose from {', '.join(SAMPLERS)}.")
    if (fps is not None) != (sampler == "fixed_fps"):
        raise ValueError(
            f"fps={fps} with sampler={sampler!r}: sampler=fixed_fps needs fps, and no other sampler uses it."
        )
    if stride != 1 and sampler not in ("random", "multi_clip"):
        raise ValueError(
            f"stride={stride} with sampler={sampler!r}: only sampler=random and sampler=multi_clip use stride."
        )
    if num_clips < 1 or (num_clips > 1 and sampler != "multi_clip"):
        raise ValueError(f"num_clips={num_clips} with sampler={sampler!r}: use sampler=multi_clip, and at least 1.")


def _check_crops(num_crops: int, sampler: str, image_size: int | Sequence[int] | None, resize: str) -> None:
    if num_crops not in (1, 3):
        raise ValueError(f"num_crops={num_crops} is neither 1 (the centre) nor 3 (start, middle, end): choose one.")
    if num_crops > 1 and (sampler != "multi_clip" or image_size is None or resize != "crop"):
        raise ValueError(
            f"num_crops={num_crops} with sampler={sampler!r}, image_size={image_size} and resize={resize!r}: crops are "
            "cut for testing, so set sampler=multi_clip, an image_size and resize=crop."
        )
