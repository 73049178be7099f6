"""Clips from tar shards of videos, on a local disk or in object storage, read by byte ranges.

``blueberry shards`` writes the shards from a folder of :class:`~blueberry_video.data.video_folder.VideoFolder`. The
clips of a split, their order, frames, labels and captions are those of the folder.
"""

import hashlib
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np

from blueberry_video.data.batches import TrainBatches, WindowedTrainBatches
from blueberry_video.data.metadata import Row, renamed_classes
from blueberry_video.data.shard_cache import ShardCache
from blueberry_video.data.shard_index import BLOCK, COMMAND, INDEX, MANIFEST, Manifest, ShardIndex, ShardRow, ShardRows
from blueberry_video.data.shard_store import Store
from blueberry_video.data.video_folder import VideoClips
from blueberry_video.video.decode import BACKENDS
from blueberry_video.video.errors import BrokenVideoError
from blueberry_video.video.source import Source


class VideoShards(VideoClips):
    """Map-style dataset of the clips in tar shards, as :class:`~blueberry_video.data.video_folder.VideoFolder`.

    Args:
        root: folder that ``blueberry shards`` wrote: a local path, ``s3://bucket/folder``, ``gs://bucket/folder`` or
            ``memory://folder``.
        num_frames, sampler, stride, fps, num_clips, num_crops, image_size, resize, pad: see ``VideoFolder``.
        split: use only the clips of this split; None uses all, which requires that the splits are rows of metadata.
        classes: class names of each label, which replace those of the shards.
        backends, tone_map, square_pixels, deinterlace, max_broken_share, skipped_file, seed: see ``VideoFolder``.
        cache: folder on a local disk for the clips that were read, shared by all processes of a machine; None reads
            every clip from ``root``.
        cache_gb: limit on the size of the cache, in units of 10⁹ bytes; the shards that were not read for the longest
            time are removed.
        cache_fetch: bytes that are read if a clip is not in the cache: ``clip``, or the whole ``shard``, for a cache
            that holds the dataset, or with ``shuffle_window``.
        shuffle_window: in training, shuffle the shards and then the clips within each group of this number of
            consecutive shards, so that the reads of a while are in few shards; None shuffles all clips.
        antialias: see ``VideoFolder``.

    Raises:
        FileNotFoundError: no shards at root, or a shard of the manifest is missing.
        ValueError: an unfinished or truncated folder, an index of other shards, or an argument out of range.
        RuntimeError: (when reading a clip) a shard has vanished or differs from the index; more than
            ``max_broken_share`` of the clips are broken.
    """

    repair = "Repair or remove them in the source folder, and write the shards again"
    mend = f"copy the shard and {INDEX} again, or run `{COMMAND}` into another folder"  # for a shard of another index
    rows: Sequence[Row]

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
        split: str | None = None,
        classes: dict[str, Sequence[str]] | None = None,
        backends: Sequence[str] = BACKENDS,
        tone_map: str = "none",
        square_pixels: bool = False,
        deinterlace: str = "none",
        max_broken_share: float = 0.05,
        skipped_file: str | None = None,
        seed: int = 0,
        cache: str | None = None,
        cache_gb: float = 100.0,
        cache_fetch: Literal["clip", "shard"] = "clip",
        shuffle_window: int | None = None,
        antialias: bool = True,
    ):
        how = (sampler, stride, fps, num_clips, num_crops, image_size, resize, pad)
        rendering = (tone_map, square_pixels, deinterlace)
        super().__init__(root, num_frames, *how, backends, *rendering, max_broken_share, skipped_file, seed, antialias)
        if shuffle_window is not None and shuffle_window < 1:
            raise ValueError(f"shuffle_window={shuffle_window} must be at least 1 shard, or null to shuffle all clips.")
        self.shuffle_window = shuffle_window
        self.store = Store(root)
        self.location = self.store.url
        self.manifest = self._read_manifest()
        key = hashlib.sha256(f"{self.store.url}\n{self.manifest.digest}".encode()).hexdigest()[:16]
        self._cache = ShardCache(cache, cache_gb, cache_fetch, self.store, key) if cache is not None else None
        self._check_shards()
        self.index = self._read_index()
        self._shards = {shard.name: shard for shard in self.manifest.shards}
        self.classes, self.reversal_pairs = renamed_classes(
            self.manifest.classes, self.manifest.reversal_pairs, classes
        )
        self.classes = {label: self.classes.get(label, self.manifest.classes[label]) for label in self.index.labels}
        self.split, self._clips = split, self.index.select(split)
        self.rows = ShardRows(self.index, self._clips, self._class_ids())

    def describe(self) -> str:
        """One line about the clips."""
        read = [shard for shard in self.manifest.shards if self.split in (None, shard.split)]
        cached = "" if self._cache is None else f", cache of {self._cache.limit / 1e9:g} GB in {self._cache.top}"
        size = sum(shard.bytes for shard in read) / 1e9
        return f"{len(self)} clips of {self.location} ({len(read)} shards, {size:.3g} GB{cached})"

    def train_batches(
        self, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, drop_last: bool = True
    ) -> TrainBatches:
        """Batch sampler for training, with the order of ``shuffle_window``."""
        if self.shuffle_window is None:
            return TrainBatches(len(self), batch_size, seed, rank, world_size, drop_last)
        window, (order, counts) = self.shuffle_window, self._by_shard()
        return WindowedTrainBatches(order, counts, window, batch_size, seed, rank, world_size, drop_last)

    @contextmanager
    def opened(self, row: Row) -> Iterator[Path | Source]:
        """Source of a clip: a private temporary file with its suffix, since decoders read local files only."""
        assert isinstance(row, ShardRow)
        data = self.read(row)
        with tempfile.NamedTemporaryFile(prefix="blueberry-video-", suffix=Path(row.name).suffix.lower()) as file:
            file.write(data)
            file.flush()
            yield Source("bytes", str(row.path), path=Path(file.name))

    def read(self, row: ShardRow) -> memoryview:
        """Returns the bytes of the video of a row.

        Raises:
            BrokenVideoError: the bytes are damaged.
            RuntimeError: the shard has vanished, is truncated, or is not the one of the index.
            ConnectionError: the network failed in every try.
        """
        shard, start, end = self._shards[row.shard], row.offset - BLOCK, row.offset + row.size
        where = f"{self.store.path(shard.name)} (clip {row.name}, bytes {row.offset} to {end})"
        try:
            if self._cache is not None:
                data = self._cache.read(shard, start, end, lambda found: self._check(found, row) is None)
            else:
                data = self.store.read(shard.name, start, end)
        except (FileNotFoundError, PermissionError) as error:  # not a broken clip, which would be skipped
            raise RuntimeError(
                f"{where} cannot be read ({error}): restore the shard, or {self.mend}; a run continues with "
                "resume=last."
            ) from error
        problem = self._check(data, row)
        if problem == "crc":
            raise BrokenVideoError(
                f"{where} is damaged: its CRC-32 is not {row.crc:08x}. Copy the shard again (`sha256sum -c SHA256SUMS` "
                "checks all)."
            )
        if problem is not None:
            raise RuntimeError(f"{where} {problem}: {self.mend}.")
        return memoryview(data)[BLOCK:]

    def _check(self, data: bytes, row: ShardRow) -> str | None:
        return check_clip(data, row)

    def _version(self, row: Row) -> list[int]:
        assert isinstance(row, ShardRow)
        return [row.size, row.offset if row.crc is None else row.crc]

    def _num_skipped(self, rows: Sequence[Row]) -> int:
        return sum(map(rows.has, self.skipped)) if isinstance(rows, ShardRows) else super()._num_skipped(rows)

    def _read_manifest(self) -> Manifest:
        path = self.store.path(MANIFEST)
        try:
            return Manifest.from_bytes(self.store.read(MANIFEST), path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"there is no {path}: set root to a folder that `{COMMAND}` wrote, or for a folder of video files use "
                "data=video_folder."
            ) from error

    def _check_shards(self) -> None:
        """Checks that the folder is complete, with one listing."""
        found = self.store.sizes()
        if INDEX not in found:
            done = sum(shard.name in found for shard in self.manifest.shards)
            raise ValueError(
                f"{self.store.url} has {done} of {len(self.manifest.shards)} shards and no {INDEX}, because writing "
                f"was interrupted or the copy is not complete: repeat the same `{COMMAND}`, which continues, or "
                "the copy."
            )
        for shard in self.manifest.shards:
            if shard.name not in found:
                raise FileNotFoundError(
                    f"there is no {self.store.path(shard.name)}, which {MANIFEST} lists with {shard.clips} clips: copy "
                    f"it again, or repeat the same `{COMMAND}`, which writes it again."
                )
            if found[shard.name] != shard.bytes:
                raise ValueError(
                    f"{self.store.path(shard.name)} has {found[shard.name]} bytes instead of {shard.bytes}: it is "
                    f"truncated or another shard. Copy it again, or repeat the same `{COMMAND}`, which writes it again."
                )

    def _read_index(self) -> ShardIndex:
        where = self.store.path(INDEX)
        if self._cache is not None:
            return ShardIndex(self._cache.index(), self.manifest, where)
        if self.store.local is not None:
            return ShardIndex(self.store.local / INDEX, self.manifest, where)
        return ShardIndex(self.store.read(INDEX), self.manifest, where)

    def _class_ids(self) -> dict[str, np.ndarray]:
        """Class id for every class id of the shards, for labels with other classes."""
        ids = {}
        for label, names in self.classes.items():
            stored = self.manifest.classes[label]
            if names == stored:
                continue
            used = np.unique(self.index.columns[f"label.{label}"])
            if unknown := [stored[i] for i in used if stored[i] not in names]:
                raise ValueError(
                    f"{self.store.url}: label {label} has the classes {', '.join(unknown[:5])}, which are not among "
                    f"{', '.join(names)}: add them to the argument classes, or leave it out."
                )
            ids[label] = np.array([names.index(name) if name in names else -1 for name in stored])
        return ids

    def _by_shard(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the indices of the dataset in the order of the shards, and the number of indices of each shard."""
        per_clip = self.num_clips * self.num_crops
        if not isinstance(self.rows, ShardRows):
            raise ValueError("shuffle_window cannot be used with buckets: set shuffle_window=null.")
        clips = np.asarray(self._clips)
        positions = np.argsort(clips, kind="stable")
        counts = np.diff(np.searchsorted(clips[positions], self.index.starts)) * per_clip
        order = (positions[:, None] * per_clip + np.arange(per_clip)).ravel()
        return order, counts[counts > 0]


def check_clip(data: bytes, row: ShardRow) -> str | None:
    """Returns what is wrong with the tar header and bytes of a clip: None, ``crc``, or a phrase for messages."""
    if len(data) < BLOCK + row.size:
        return f"ends after {len(data)} of {BLOCK + row.size} bytes"
    if data[257:262] != b"ustar":
        return "has no tar header there"
    name, size = data[:100].rstrip(b"\0").decode(errors="replace"), data[124:135].decode(errors="replace")
    if name.partition(".")[0] != row.key or size != f"{row.size:011o}":
        return f"has {name} of {size} bytes (octal) there instead of {row.key} of {row.size:011o} bytes"
    return None if zlib.crc32(memoryview(data)[BLOCK:]) == row.crc else "crc"
