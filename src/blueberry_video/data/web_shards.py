"""Clips from tar files in the layout of WebDataset, on a local disk or in object storage, read by byte ranges.

The tar files are those of another program; ``blueberry shards`` writes shards with an index, which are read by
:class:`~blueberry_video.data.video_shards.VideoShards`.
"""

import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from blueberry_video.atomic import write_bytes
from blueberry_video.data.shard_cache import locked
from blueberry_video.data.shard_index import BLOCK, Manifest, ShardIndex, ShardRow, read_columns
from blueberry_video.data.video_shards import VideoShards
from blueberry_video.data.web_index import INDEXED, build_index, digest_of, list_shards, unknown_classes
from blueberry_video.video.decode import BACKENDS

_CACHE = "blueberry-video/web-shards"  # below the folder of caches of the user
_ASCII_NAME = 90  # longest key that a plain tar header has unabridged


class WebShards(VideoShards):
    """Map-style dataset of the clips in tar files of WebDataset, as
    :class:`~blueberry_video.data.video_folder.VideoFolder`.

    Args:
        root: folder with tar files; or their names, as ``s3://bucket/folder/{000000..000012}.tar`` or
            ``folder/train-*.tar``. Local, ``s3://``, ``gs://`` or ``memory://``.
        num_frames, sampler, stride, fps, num_clips, num_crops, image_size, resize, pad: see ``VideoFolder``.
        classes: class names of each label; default to the sorted names found, and for class ids to the numbers from 0
            to the largest one.
        backends, max_broken_share, skipped_file, seed: see ``VideoFolder``.
        cache, cache_gb, cache_fetch, shuffle_window: see ``VideoShards``.
        tone_map, square_pixels, deinterlace, antialias: see ``VideoFolder``.
        index: folder for the index of the shards, which is built on first use; None: the user's folder of caches.

    Attributes:
        index: columns of all clips.

    Raises:
        FileNotFoundError: no tar file, or one of the pattern is missing.
        ValueError: a damaged shard or annotation, a class that is not among ``classes``, or an argument out of range.
        RuntimeError: (when reading a clip) a shard has vanished or changed since it was indexed; more than
            ``max_broken_share`` of the clips are broken.
    """

    repair = "Repair or remove them in the shards"
    mend = "start the command again, which reads the headers of changed shards anew"

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
        classes: dict[str, Sequence[str]] | None = None,
        backends: Sequence[str] = BACKENDS,
        max_broken_share: float = 0.05,
        skipped_file: str | None = None,
        seed: int = 0,
        cache: str | None = None,
        cache_gb: float = 100.0,
        cache_fetch: Literal["clip", "shard"] = "clip",
        shuffle_window: int | None = None,
        index: str | None = None,
        tone_map: Literal["none", "bt2390", "hable"] = "none",
        square_pixels: bool = False,
        deinterlace: Literal["none", "bwdif", "yadif"] = "none",
        antialias: bool = True,
    ):
        store, self._sizes = list_shards(str(root))
        self._index_folder = Path(index) if index is not None else _user_cache()
        how = (sampler, stride, fps, num_clips, num_crops, image_size, resize, pad, None, classes, backends)
        pixels = (tone_map, square_pixels, deinterlace)
        broken = (max_broken_share, skipped_file, seed)
        super().__init__(
            store.url, num_frames, *how, *pixels, *broken, cache, cache_gb, cache_fetch, shuffle_window, antialias
        )

    def _read_manifest(self) -> Manifest:
        """Reads the index, and builds it first if this machine has none of these shards; other processes wait."""
        digest = digest_of(self.store, self._sizes)
        self._file = self._index_folder / f"{digest[:32]}.safetensors"
        self._index_folder.mkdir(parents=True, exist_ok=True)
        with locked(self._file.with_suffix(".lock")):
            if not self._file.is_file():
                write_bytes(self._file, build_index(self.store, self._sizes, digest))
        _, metadata = read_columns(np.memmap(self._file, np.uint8, "r").view(np.ndarray), str(self._file))
        return Manifest.from_bytes(metadata["manifest"].encode(), str(self._file))

    def _check_shards(self) -> None:
        """Nothing is left to check: the names and sizes are part of the digest of the index."""

    def _read_index(self) -> ShardIndex:
        index = ShardIndex(self._file, self.manifest, str(self._file))
        named = dict(self.manifest.classes)
        for label, names in named.items():
            if names == INDEXED:
                self.manifest.classes[label] = tuple(map(str, range(int(index.columns[f"label.{label}"].max()) + 1)))
        self._with_ids = {label for label, names in named.items() if names == INDEXED}
        return index

    def _class_ids(self) -> dict[str, np.ndarray]:
        ids = {}
        for label, names in self.classes.items():
            stored, column = self.manifest.classes[label], self.index.columns[f"label.{label}"]
            moved = np.array([names.index(name) if name in names else -1 for name in stored])
            if label in self._with_ids:
                moved = np.where(np.arange(len(stored)) < len(names), np.arange(len(stored)), -1)
                self._check_first(label, names, column)
            if (wrong := np.flatnonzero(moved[column] < 0)).size:
                row = self.index.row(int(wrong[0]))
                where = f"{self.store.path(row.shard)} ({row.key})"
                raise unknown_classes(label, [stored[int(column[wrong[0]])]], names, where)
            if label not in self._with_ids and names != stored:
                ids[label] = moved
        return ids

    def _check_first(self, label: str, names: Sequence[str], column: np.ndarray) -> None:
        """Checks that class ids without names do not count from 1."""
        used = np.unique(column)
        if names == self.manifest.classes[label] and len(used) > 1 and (used == np.arange(1, len(used) + 1)).all():
            row = self.index.row(int(np.flatnonzero(column == 1)[0]))
            raise ValueError(
                f"{self.store.path(row.shard)} ({row.key}) has the class id 1 of {label}, and the ids are 1 to "
                f"{len(used)}, without 0: class ids count from 0. Subtract 1 from each, or name the classes in "
                f"classes.{label} if class 0 has no clips here."
            )

    def _check(self, data: bytes, row: ShardRow) -> str | None:
        if len(data) < BLOCK + row.size:
            return f"ends after {len(data)} of {BLOCK + row.size} bytes"
        try:
            header = tarfile.TarInfo.frombuf(bytes(data[:BLOCK]), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return "has no tar header there"
        plain = row.key.isascii() and len(row.key) < _ASCII_NAME  # others are in a header of their own
        if header.size != row.size or (plain and not header.name.removeprefix("./").startswith(row.key)):
            return f"has {header.name} of {header.size} bytes there instead of {row.key} of {row.size} bytes"
        return None


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / _CACHE
