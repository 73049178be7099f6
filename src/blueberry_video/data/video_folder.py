"""Clips from a folder of video files with captions and labels.

    <root>/videos/*.mp4                      any container that FFmpeg reads; sub-folders allowed
    <root>/metadata.{jsonl,json,csv}         one row a file
    <root>/classes.json                      optional: {"classes": {label: [names]}, "reversal_pairs": {label: [[i,
    j]]}}

See ``read_metadata`` for the rows. Which frames a clip shows is a pure function of (seed, epoch, file name), never of
the worker that decodes it.
"""

import csv
import fcntl
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from blueberry_video.data.metadata import Row, read_classes, read_metadata
from blueberry_video.video import resize as resizing
from blueberry_video.video import sampling
from blueberry_video.video.container import VideoInfo
from blueberry_video.video.decode import BACKENDS, DecodeOptions, decode
from blueberry_video.video.errors import VideoError

SAMPLERS = ("uniform", "random", "fixed_fps", "multi_clip")


class VideoFolder(Dataset):
    """Map-style dataset of clips: ``video`` uint8 (T, 3, H, W), ``id``, ``fps`` and, where the metadata has them,
    ``caption``, ``labels``.

    Args:
        root: the folder laid out as above.
        num_frames: T.
        sampler: ``uniform``: spread over the whole video; ``random``: a window of every ``stride``-th frame, at
            another place in each epoch; ``fixed_fps``: frames 1 / ``fps`` s apart, in the middle of the video;
            ``multi_clip``: ``num_clips`` evenly spaced windows of each file, for testing. Each window is an item of
            its own, with id ``name#k``, so that a clip always has the same shape; average what a model says over the
            part of the id before ``#``.
        stride: frames between two of a ``random`` or ``multi_clip`` window.
        fps: frames a second of ``fixed_fps``.
        num_clips: windows a file of ``multi_clip``.
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

    def __init__(
        self,
        root: str | Path,
        num_frames: int,
        sampler: Literal["uniform", "random", "fixed_fps", "multi_clip"] = "uniform",
        stride: int = 1,
        fps: float | None = None,
        num_clips: int = 1,
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
        _check_choices(sampler, stride, fps, num_clips, resize)
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(
                f"image_size={image_size} is no size in pixels: write one number of at least 1, [height, width], or "
                "null for the size of the files."
            )
        if not 0 <= max_broken_share <= 1:
            raise ValueError(
                f"max_broken_share={max_broken_share} is outside 0 to 1: it is a share of the files, such as 0.05."
            )
        self.root = Path(root)
        if make is not None:
            make(self.root)
        self.num_frames, self.sampler, self.stride, self.fps, self.num_clips = (
            num_frames,
            sampler,
            stride,
            fps,
            num_clips,
        )
        self.image_size = (int(size[0]), int(size[1])) if size is not None else None
        self.resize, self.pad = resize, pad
        # one thread, for loaders have many workers; a damaged file is skipped, not salvaged: training repeats it often
        self.decoding = DecodeOptions(backends=tuple(backends), num_threads=1, salvage=False)
        self.max_broken_share, self.skipped_file, self.seed = max_broken_share, skipped_file, seed
        self.varies_by_epoch = sampler == "random"
        named, self.reversal_pairs = read_classes(self.root)
        named = {name: tuple(values) for name, values in (classes or named).items()}
        self.classes: dict[str, tuple[str, ...]]
        self.rows: list[Row]
        self.rows, self.classes = read_metadata(self.root, metadata, split, named)
        self.skipped: dict[
            str, str
        ] = {}  # file name -> reason, of those that this process met or read from skipped_file

    def __len__(self) -> int:
        return len(self.rows) * self.num_clips

    def __getitem__(self, index: int) -> dict:
        return self.sample(index, epoch=0)

    def sample(self, index: int, epoch: int) -> dict:
        """Clip ``index`` as epoch ``epoch`` shows it."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside this dataset of {len(self)} clips.")
        start, clip = divmod(index, self.num_clips)
        for step in range(len(self.rows)):
            row = self.rows[(start + step) % len(self.rows)]
            if row.name in self.skipped:
                continue
            try:
                return self._read(row, clip, epoch)
            except VideoError as error:
                self.skip(row.name, str(error))
        raise RuntimeError(
            f"All {len(self.rows)} video files in {self.root} are broken: {self._examples()}. Replace them."
        )

    def skip(self, name: str, reason: str) -> None:
        """Lists a broken file.

        Raises:
            RuntimeError: more than ``max_broken_share`` of the files are broken.
        """
        self.skipped[name] = reason
        if self.skipped_file is not None:
            self.skipped.update(_append_skipped(Path(self.skipped_file), self.root, name, reason))
        broken = sum(row.name in self.skipped for row in self.rows)
        if broken > self.max_broken_share * len(self.rows):
            raise RuntimeError(
                f"{broken} of {len(self.rows)} video files in {self.root} are broken, more than "
                f"max_broken_share={self.max_broken_share}: "
                f"{self._examples()}. Replace or remove them (with their metadata rows), or raise max_broken_share."
            )

    @property
    def cache_key(self) -> str:
        """Everything a clip depends on but its index: settings, files with size and modification time, labels and
        captions."""
        digest = hashlib.sha256()
        for row in self.rows:
            stat = row.path.stat()
            digest.update(json.dumps([row.name, stat.st_size, stat.st_mtime_ns, row.caption, row.labels]).encode())
        settings: list = [
            self.num_frames,
            self.sampler,
            self.stride,
            self.fps,
            self.num_clips,
            self.image_size,
            self.resize,
        ]
        settings += [self.pad, self.decoding.backends, self.seed]
        return f"video-folder-2/{json.dumps(settings)}/{digest.hexdigest()}"

    def _read(self, row: Row, clip: int, epoch: int) -> dict:
        rng = np.random.default_rng([self.seed, epoch, int(hashlib.sha256(row.name.encode()).hexdigest()[:16], 16)])
        frames = decode(row.path, lambda info: self._choose(info, clip, rng), self.decoding)
        seconds = frames.timestamps.unique()  # without the repetitions of padding
        fps = self.fps or ((len(seconds) - 1) / float(seconds[-1] - seconds[0]) if len(seconds) > 1 else 0.0)
        sample: dict = {
            "video": self._resized(frames.pixels),
            "id": f"{row.name}#{clip}" if self.sampler == "multi_clip" else row.name,
            "fps": float(fps),
        }
        if row.caption is not None:
            sample["caption"] = row.caption
        if row.labels:
            sample["labels"] = dict(row.labels)
        return sample

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

    def _resized(self, pixels: Tensor) -> Tensor:
        if self.image_size is not None:
            how = resizing.crop if self.resize == "crop" else resizing.resize
            pixels = how(pixels, self.image_size, resample="fast", interpolation="bilinear")
        return pixels.contiguous()  # decoders give channels last

    def _examples(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in list(self.skipped.items())[:3])


def _check_choices(sampler: str, stride: int, fps: float | None, num_clips: int, resize: str) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler!r} does not exist: choose from {', '.join(SAMPLERS)}.")
    if resize not in ("crop", "stretch"):
        raise ValueError(f"resize={resize!r} is neither 'crop' nor 'stretch': choose one of these.")
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


def _append_skipped(path: Path, root: Path, name: str, reason: str) -> dict[str, str]:
    """Adds a row unless the file is listed already; returns what is listed of this root. Safe when several workers do
    it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
        file.seek(0)
        text = file.read()
        listed = {row["file"]: row["reason"] for row in csv.DictReader(io.StringIO(text)) if row["root"] == str(root)}
        if name not in listed:
            writer = csv.writer(file)
            if not text:
                writer.writerow(["root", "file", "reason"])
            writer.writerow([str(root), name, reason])
    return {**listed, name: reason}
