"""Clips rendered or decoded once, then read from disk.

Shards of consecutive clips, each one file: an 8-byte magic, the lengths of what follows, a CRC of it, a JSON table of
the clips (dtype, shape and place of every array, all other values) and the arrays. A shard appears under its name only
when it is complete (``atomic.write_bytes``), one process builds it while others wait at its lock, and a file that
is torn or damaged fails its CRC and is built again. Reading maps the file into memory and copies one clip out of it.
"""

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blueberry_video.atomic import write_bytes
from blueberry_video.data.progress import Progress

MAGIC = b"BBCLIPS1"
_HEADER = struct.Struct("<8sQQI")  # magic, bytes of the table, bytes of the arrays, crc32 of both
_MAX_OPEN = 512  # mapped shards a process: each holds a file descriptor


class Clips(Protocol):
    """A map-style dataset of clips."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict: ...


class KeyedClips(Clips, Protocol):
    """A dataset whose clips depend on nothing but ``cache_key`` and the index."""

    @property
    def cache_key(self) -> str: ...


class CachedClips(Dataset):
    """A map-style dataset whose clips are computed once and kept in ``folder``.

    Args:
        dataset: ``dataset[i]`` must depend on nothing but its ``cache_key`` (str) and ``i``; an item is a dict of
            tensors, numbers, strings and dicts of these.
        folder: holds one sub-folder for each cache key; a dataset with other settings never reads another's clips.
        shard_size: clips a file. A clip that is asked for first costs the time of its whole shard: call ``prepare``
            before.

    Raises:
        ValueError: the dataset has no ``cache_key``, or shows other frames in each epoch.
    """

    def __init__(self, dataset: KeyedClips, folder: str | Path, shard_size: int = 128):
        check_storable(dataset)
        if shard_size < 1:
            raise ValueError(f"shard_size={shard_size} holds no clip: use at least 1.")
        self.dataset = dataset
        self.shard_size = shard_size
        self.classes: dict[str, tuple[str, ...]] = getattr(dataset, "classes", {})
        self.reversal_pairs: dict[str, tuple[tuple[int, int], ...]] = getattr(dataset, "reversal_pairs", {})
        self.folder = Path(folder) / hashlib.sha256(self.cache_key.encode()).hexdigest()[:16]
        self._shards: dict[int, _Shard] = {}

    @property
    def cache_key(self) -> str:
        """The key of the wrapped dataset."""
        return self.dataset.cache_key

    @property
    def skipped_file(self) -> str | None:
        """Where the wrapped dataset lists files that it skips."""
        return getattr(self.dataset, "skipped_file", None)

    @skipped_file.setter
    def skipped_file(self, path: str | None) -> None:
        if hasattr(self.dataset, "skipped_file"):
            self.dataset.skipped_file = path

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside this dataset of {len(self)} clips.")
        number, place = divmod(index, self.shard_size)
        shard = self._shards.get(number)
        if shard is None:
            shard = self._open(number)
            if len(self._shards) >= _MAX_OPEN:
                self._shards.pop(next(iter(self._shards)))
            self._shards[number] = shard
        return shard.clip(place)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_shards": {}}  # maps do not travel between processes

    def prepare(self, num_workers: int = 0) -> None:
        """Builds the shards that are missing, in ``num_workers`` processes (0: in this one), and prints how it goes."""
        missing = [k for k in range(-(-len(self) // self.shard_size)) if not self._path(k).exists()]
        if not missing:
            return
        progress = Progress("clip cache", sum(len(self._indices(k)) for k in missing))
        workers = min(num_workers, len(missing))
        own = torch.Generator()  # the global one must not tell whether a cache was there
        for number in DataLoader(_Builder(self, missing), batch_size=None, num_workers=workers, generator=own):
            progress.add(len(self._indices(number)))

    def _path(self, number: int) -> Path:
        """The last shard's name tells its length, so that a dataset that has grown does not read it as a full one."""
        return self.folder / f"{number:06d}-{len(self._indices(number))}.clips"

    def _indices(self, number: int) -> range:
        return range(number * self.shard_size, min((number + 1) * self.shard_size, len(self)))

    def _open(self, number: int) -> "_Shard":
        shard = _load(self._path(number))
        if shard is None:
            self._build(number)
            shard = _load(self._path(number))
            if shard is None:
                raise OSError(
                    f"The clip cache file {self._path(number)} was damaged as soon as it was written: check the disk."
                )
        for name, reason in shard.skipped.items():  # a finished cache must still say what is missing from it
            if name not in self.dataset.skipped:  # type: ignore[attr-defined]
                self.dataset.skip(name, reason)  # type: ignore[attr-defined]
        return shard

    def _build(self, number: int) -> None:
        path = self._path(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        (self.folder / "key.txt").write_text(self.cache_key)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when closed, also by a crash
            if _load(path) is not None:
                return  # another process was faster
            clips = [self.dataset[i] for i in self._indices(number)]
            write_bytes(path, _pack(clips, getattr(self.dataset, "skipped", {})))


def check_storable(dataset: object) -> None:
    """Whether the clips of a dataset may be kept on disk.

    Raises:
        ValueError: it has no ``cache_key``, or shows other frames in each epoch.
    """
    if not isinstance(getattr(dataset, "cache_key", None), str):
        raise ValueError(
            f"{type(dataset).__name__} has no cache_key, so a cache could not tell its clips from those of other "
            "settings: give it one that names everything a clip depends on, or use it without a cache."
        )
    if getattr(dataset, "varies_by_epoch", False):
        raise ValueError(
            f"{type(dataset).__name__} shows other frames in each epoch (sampler=random), which a cache would freeze: "
            "choose sampler=uniform, or use it without a cache."
        )


class _Builder(Dataset):
    """Item k builds the k-th of the missing shards: so that a DataLoader's processes build them."""

    def __init__(self, clips: CachedClips, missing: list[int]):
        self._clips, self._missing = clips, missing

    def __len__(self) -> int:
        return len(self._missing)

    def __getitem__(self, k: int) -> int:
        self._clips._build(self._missing[k])
        return self._missing[k]


class _Shard:
    """A mapped file, whose CRC has been checked."""

    def __init__(self, data: mmap.mmap, table: dict, start: int):
        self._data, self._clips, self._start = data, table["clips"], start
        self.skipped: dict[str, str] = table["skipped"]

    def clip(self, place: int) -> dict:
        return self._restore(self._clips[place])

    def _restore(self, value: dict) -> dict:
        return {key: self._value(item) for key, item in value.items()}

    def _value(self, item):
        if not isinstance(item, dict):
            return item
        if "array" not in item:
            return self._restore(item["dict"])
        dtype, shape, offset = item["array"]
        count = int(np.prod(shape, dtype=np.int64))
        return torch.from_numpy(np.frombuffer(self._data, dtype, count, self._start + offset).reshape(shape).copy())


def _pack(clips: list[dict], skipped: dict[str, str]) -> bytes:
    arrays: list[np.ndarray] = []
    offset = 0

    def described(value):
        nonlocal offset
        if isinstance(value, dict):
            return {"dict": {key: described(item) for key, item in value.items()}}
        if not isinstance(value, Tensor):
            return value
        array = np.ascontiguousarray(value.numpy()).reshape(tuple(value.shape))
        arrays.append(array)
        place, offset = offset, offset + array.nbytes
        return {"array": [array.dtype.str, list(array.shape), place]}

    table = {"clips": [described(clip)["dict"] for clip in clips], "skipped": skipped}
    text = json.dumps(table).encode()
    payload = b"".join([text, *(array.tobytes() for array in arrays)])
    return _HEADER.pack(MAGIC, len(text), offset, zlib.crc32(payload)) + payload


def _load(path: Path) -> _Shard | None:
    """The shard, or None where there is no file or not a whole one."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < _HEADER.size:
            return None
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        magic, text, size, crc = _HEADER.unpack_from(data)
        start = _HEADER.size + text
        if magic != MAGIC or len(data) != start + size or zlib.crc32(memoryview(data)[_HEADER.size :]) != crc:
            return None
        return _Shard(data, json.loads(data[_HEADER.size : start]), start)
    return None
