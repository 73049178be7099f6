"""Clips from a folder of video files with captions and labels, in one of two layouts:

    <root>/videos/*.mp4                 any container that FFmpeg reads; sub-folders allowed
    <root>/metadata.{jsonl,json,csv}    one row per file, see ``read_metadata``

    <root>/<split>/<class>/*.mp4        also without split; sets the label ``class``

and optionally

    <root>/classes.json                 {"classes": {label: [names]}, "reversal_pairs": {label: [[i, j]]}}

The frames of a clip are a pure function of (seed, epoch, file name), independent of the worker that decodes them.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from blueberry_video.data.media_folder import MediaFolder
from blueberry_video.data.metadata import (
    VIDEOS,
    Row,
    has_class_folders,
    read_class_folders,
    read_classes,
    read_metadata,
)
from blueberry_video.video import resize as resizing
from blueberry_video.video.clip import load_clip
from blueberry_video.video.container import VideoInfo, open_video, probe
from blueberry_video.video.decode import BACKENDS, DecodeOptions, Frames
from blueberry_video.video.errors import VideoError
from blueberry_video.video.resize import ResizeOptions
from blueberry_video.video.sampling import ClipSampling
from blueberry_video.video.source import Source


class VideoClips(MediaFolder):
    """Base of a map-style dataset of video files: sampling, decoding, cropping and resizing.

    A subclass sets ``rows``, ``classes`` and ``reversal_pairs``, and opens the file of a row. The arguments are those
    of :class:`VideoFolder`.
    """

    media = VIDEOS
    reversal_pairs: dict[str, tuple[tuple[int, int], ...]]

    def __init__(
        self,
        root: str | Path,
        num_frames: int,
        sampler: Literal["uniform", "random", "fixed_fps", "multi_clip", "segments"],
        stride: int,
        fps: float | None,
        num_clips: int,
        num_crops: Literal[1, 3],
        image_size: int | Sequence[int] | None,
        resize: Literal["crop", "stretch"],
        pad: bool,
        backends: Sequence[str],
        tone_map: str,
        square_pixels: bool,
        deinterlace: str,
        max_broken_share: float,
        skipped_file: str | None,
        seed: int,
        antialias: bool,
    ):
        self.num_frames, self.sampler, self.stride, self.fps, self.pad = num_frames, sampler, stride, fps, pad
        self.num_clips, self.num_crops = num_clips, num_crops
        self.items = 1 if sampler == "segments" else num_clips  # per file and crop
        _ = self.sampling  # validates the arguments
        _check_crops(num_crops, sampler, image_size, resize)
        super().__init__(root, image_size, resize, max_broken_share, skipped_file, antialias)
        # one thread, since data loaders have many workers; damaged files are skipped, since training would repeat them
        self.decoding = DecodeOptions(
            tuple(backends), num_threads=1, salvage=False, tone_map=tone_map, deinterlace=deinterlace
        )
        self.square_pixels = square_pixels
        self.seed = seed
        self.varies_by_epoch = sampler in ("random", "segments")
        self._last: tuple[tuple[str, int], Frames] | None = None  # (file, clip) and its frames, for num_crops=3

    def __len__(self) -> int:
        return len(self.rows) * self.items * self.num_crops

    def __getitem__(self, index: int) -> dict:
        return self.sample(index, epoch=0)

    def sample(self, index: int, epoch: int) -> dict:
        """Returns clip ``index`` of epoch ``epoch``."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside this dataset of {len(self)} clips.")
        rest, crop = divmod(index, self.num_crops)
        start, clip = divmod(rest, self.items)
        return self._first_good(start, lambda row: self._read(row, clip, crop, epoch))

    def opened(self, row: Row) -> AbstractContextManager[Path | Source]:
        """Context manager of the file of a row: a local path, or a source that is deleted on exit."""
        return nullcontext(row.path)

    def probe(self, row: Row) -> VideoInfo:
        """Returns the properties of the file of a row; raises as :func:`~blueberry_video.video.container.probe`."""
        with self.opened(row) as source:
            if isinstance(source, Source):
                assert source.path is not None
                with open_video(source.path, name=source.name) as video:
                    return video.info
            return probe(source)

    def frames(self, row: Row) -> Frames:
        """Returns the decoded frames of the first clip of a row; raises VideoError or OSError for a broken file."""
        return self._load(row, 0, 0)

    @property
    def sampling(self) -> ClipSampling:
        """Sampling of the frames of a clip."""
        return ClipSampling(self.sampler, self.num_frames, self.stride, self.fps, self.num_clips, self.pad)

    @property
    def cache_key(self) -> str:
        """Key of everything that determines the clips: settings, files with size and modification time, labels and
        captions."""
        settings: list = [self.num_frames, self.sampler, self.stride, self.fps, self.num_clips, self.image_size]
        settings += [self.resize, self.pad, self.decoding.backends, self.seed]
        settings += [self.num_crops] if self.num_crops > 1 else []
        settings += self._resampling
        rendering = {"tone_map": self.decoding.tone_map, "deinterlace": self.decoding.deinterlace}
        settings += [[name, value] for name, value in rendering.items() if value != "none"]
        settings += ["square_pixels"] if self.square_pixels else []
        return f"video-folder-2/{json.dumps(settings)}/{self._digest()}"

    def _read(self, row: Row, clip: int, crop: int, epoch: int) -> dict:
        part = f"#{clip}" if self.sampler == "multi_clip" or self.num_crops > 1 else ""
        if self.num_crops == 1:
            frames = self._load(row, clip, epoch)
            video = frames.pixels
        else:
            assert self.image_size is not None
            if self._last is None or self._last[0] != (row.name, clip):
                self._last = (row.name, clip), self._load(row, clip, epoch=0)
            frames = self._last[1]
            video, part = resizing.window(frames.pixels, self.image_size, crop), f"{part}.{crop}"
        seconds = frames.timestamps[: self.num_frames].unique()  # without the repetitions of padding
        fps = self.fps or ((len(seconds) - 1) / float(seconds[-1] - seconds[0]) if len(seconds) > 1 else 0.0)
        said = {**self._said(row), **self._along(row, frames)}
        if self.sampler == "segments":
            said["frames"] = torch.tensor(frames.indices)
        return {"video": video, "id": row.name + part, "fps": float(fps), **said}

    def _along(self, row: Row, frames: Frames) -> dict:
        """Entries of a clip that are recorded with its frames, such as ``actions``."""
        return {}

    def _rng(self, row: Row, epoch: int) -> np.random.Generator:
        """Generator of the random windows of a file in an epoch."""
        name = hashlib.sha256(row.name.encode()).hexdigest()[:16]
        return np.random.default_rng([self.seed, epoch, int(name, 16)])

    @property
    def _size(self) -> ResizeOptions:
        rule = "none" if self.image_size is None else "cover" if self.num_crops > 1 else self.resize
        return ResizeOptions(
            rule,
            image_size=self.image_size,
            resample="fast",
            interpolation="bilinear",
            antialias=self.antialias,
            square_pixels=self.square_pixels,
        )

    def _load(self, row: Row, clip: int, epoch: int) -> Frames:
        """Decoded frames resized to ``image_size``, or to the smallest size that covers it for ``num_crops=3``."""
        try:
            with self.opened(row) as source:
                return load_clip(source, self.sampling, self._size, self.decoding, self._rng(row, epoch), clip)
        except VideoError:
            raise
        except ValueError as error:
            raise ValueError(
                f"{row.path}: {error} In a config these are model.encoder.num_frames, data.train.stride and "
                "data.train.pad=true (or data.val.…)."
            ) from error


class VideoFolder(VideoClips):
    """Map-style dataset of clips: ``video`` uint8 (T, 3, H, W), ``id``, ``fps`` and, if the metadata has them,
    ``caption``, ``labels``.

    Args:
        root: folder with one of the layouts above.
        num_frames: T.
        sampler: ``uniform``: spread over the whole video; ``random``: a window of every ``stride``-th frame, at a
            different start in each epoch; ``fixed_fps``: frames 1 / ``fps`` s apart, in the middle of the video;
            ``multi_clip``: ``num_clips`` evenly spaced windows of each file, for testing. Each window is a separate
            item with id ``name#k``, so that all clips have the same shape; average the predictions of the items with
            the same id before ``#``; ``segments``: a random window in each of ``num_clips`` parts of the file, one
            after the other in one clip of ``num_clips`` · ``num_frames`` frames, with ``frames``, their indices in the
            file; for probes that attend across segments (``model.segments``).
        stride: frame step of a ``random``, ``multi_clip`` or ``segments`` window.
        fps: frames per second of ``fixed_fps``.
        num_clips: windows per file of ``multi_clip`` and ``segments``.
        num_crops: crops of each ``multi_clip`` window, or of the windows of ``segments`` together: 1, the center, or 3
            items ``name#<clip>.<crop>``: crops of ``image_size`` at the start, the center and the end of the longer
            side. Consecutive items share one decoding.
        image_size: pixels, one number for a square or (height, width); None keeps the size of each file, which must
            then be the same within a batch.
        resize: ``crop`` scales until the frame covers ``image_size`` and crops the center; ``stretch`` changes the
            aspect ratio.
        pad: repeat the last frame of videos that are shorter than the clip, instead of raising.
        metadata: file name below root; None finds the existing one; ``"none"`` omits caption and labels.
        split: use only the rows with this ``split``, None uses all; or the folder between root and the class folders.
        classes: class names of each label; defaults to those of ``classes.json``, else to the sorted values found (over
            all splits).
        backends: decoders in the order in which they are tried.
        tone_map: ``bt2390`` or ``hable`` maps HDR video to BT.709; ``none`` takes its signal as if it were SDR.
        square_pixels: correct the proportions of video with pixels that are not square.
        deinterlace: ``bwdif`` or ``yadif`` for interlaced frames; ``none``.
        max_broken_share: a file that no backend decodes is replaced by the next good one and listed; above this share
            of broken files, reading raises.
        skipped_file: csv that lists skipped files, shared by all processes of a run; may also be set later.
        seed: seed of the ``random`` windows.
        make: called with root before it is read, to create the folder on first use; must do nothing if the folder is
            complete.
        antialias: widen the bilinear kernel when downscaling. False: each pixel mixes its nearest 2 x 2, as in the
            published recipes of VideoMAE's fine-tuning and of V-JEPA.

    Raises:
        FileNotFoundError: no folder, no videos in it, no metadata, or a row without a file.
        ValueError: a file without a row, an invalid row, or an argument out of range.
        RuntimeError: (when reading a clip) more than ``max_broken_share`` of the files are broken.
    """

    def __init__(
        self,
        root: str | Path,
        num_frames: int,
        sampler: Literal["uniform", "random", "fixed_fps", "multi_clip", "segments"] = "uniform",
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
        tone_map: str = "none",
        square_pixels: bool = False,
        deinterlace: str = "none",
        max_broken_share: float = 0.05,
        skipped_file: str | None = None,
        seed: int = 0,
        make: Callable[[Path], None] | None = None,
        antialias: bool = True,
    ):
        how = (sampler, stride, fps, num_clips, num_crops, image_size, resize, pad)
        rendering = (tone_map, square_pixels, deinterlace)
        super().__init__(root, num_frames, *how, backends, *rendering, max_broken_share, skipped_file, seed, antialias)
        if make is not None:
            make(self.root)
        named, self.reversal_pairs = read_classes(self.root, classes)
        if metadata is None and has_class_folders(self.root, split, self.media):
            self.rows, self.classes = read_class_folders(self.root, split, named, self.media)
        else:
            self.rows, self.classes = read_metadata(self.root, metadata, split, named)


def _check_crops(num_crops: int, sampler: str, image_size: int | Sequence[int] | None, resize: str) -> None:
    if num_crops not in (1, 3):
        raise ValueError(f"num_crops={num_crops} must be 1 (center) or 3 (start, center, end).")
    if num_crops > 1 and (sampler not in ("multi_clip", "segments") or image_size is None or resize != "crop"):
        raise ValueError(
            f"num_crops={num_crops} with sampler={sampler!r}, image_size={image_size} and resize={resize!r}: three "
            "crops require sampler=multi_clip or segments, an image_size and resize=crop."
        )
