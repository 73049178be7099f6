"""Cache of clips on disk: each clip is rendered or decoded once.

A shard holds consecutive clips in one file: an 8-byte magic number, the lengths of the table and the arrays, a CRC of
both, a JSON table of the clips (dtype, shape and offset of every array, and all other values) and the arrays. Shards
are written atomically (``atomic.write_bytes``), by one process while others wait for its lock. A truncated or damaged
file fails its CRC and is built again. Reading maps the file into memory and copies one clip.
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

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blueberry_video.atomic import write_bytes
from blueberry_video.data.clips import KeyedClips, Wrapper, check_index
from blueberry_video.data.progress import Progress

MAGIC = b"BBCLIPS1"
_HEADER = struct.Struct("<8sQQI")  # magic, bytes of the table, bytes of the arrays, crc32 of both
_MAX_OPEN = 512  # mapped shards per process: each uses a file descriptor


class CachedClips(Wrapper):
    """Map-style dataset that computes the clips of another dataset once and stores them in ``folder``.

    Args:
        dataset: ``dataset[i]`` must depend only on its ``cache_key`` (str) and ``i``; an item is a dict of tensors,
            numbers, strings and dicts of these.
        folder: gets one sub-folder per cache key, so that datasets with different settings never share clips.
        shard_size: clips per file. The first access to a clip computes its whole shard: call ``prepare`` before.

    Raises:
        ValueError: the dataset has no ``cache_key``, or its clips differ between epochs.
    """

    def __init__(self, dataset: KeyedClips, folder: str | Path, shard_size: int = 128):
        check_storable(dataset)
        if shard_size < 1:
            raise ValueError(f"shard_size={shard_size} must be at least 1.")
        self.dataset, self.sources = dataset, [dataset]
        self.shard_size = shard_size
        self.classes: dict[str, tuple[str, ...]] = getattr(dataset, "classes", {})
        self.reversal_pairs: dict[str, tuple[tuple[int, int], ...]] = getattr(dataset, "reversal_pairs", {})
        self.action_names: tuple[str, ...] = getattr(dataset, "action_names", ())
        self.cache_key = dataset.cache_key  # stays the same if files change or vanish later
        self.folder = Path(folder) / hashlib.sha256(self.cache_key.encode()).hexdigest()[:16]
        self._shards: dict[int, _Shard] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def uncached(self) -> KeyedClips:
        """The dataset, of which single clips are computed without their shard."""
        return self.dataset

    def __getitem__(self, index: int) -> dict:
        check_index(index, len(self))
        number, position = divmod(index, self.shard_size)
        shard = self._shards.get(number)
        if shard is None:
            shard = self._open(number)
            if len(self._shards) >= _MAX_OPEN:
                self._shards.pop(next(iter(self._shards)))
            self._shards[number] = shard
        return shard.clip(position)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_shards": {}}  # memory maps cannot be pickled

    def prepare(self, num_workers: int = 0) -> None:
        """Builds the missing shards in ``num_workers`` processes (0: in this one) and prints the progress."""
        missing = [k for k in range(-(-len(self) // self.shard_size)) if not self._path(k).exists()]
        if not missing:
            return
        progress = Progress("clip cache", sum(len(self._indices(k)) for k in missing))
        workers = min(num_workers, len(missing))
        own = torch.Generator()  # the global one must not depend on whether a cache exists
        for number in DataLoader(_Builder(self, missing), batch_size=None, num_workers=workers, generator=own):
            progress.add(len(self._indices(number)))

    def _path(self, number: int) -> Path:
        """File of a shard. The name contains the number of clips, so that a partial last shard is not read as a full
        one after the dataset has grown."""
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
                    f"The clip cache file {self._path(number)} cannot be read back after writing: check the disk."
                )
        for name, reason in shard.skipped.items():  # files that were skipped when the cache was built
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
    """Checks that the clips of a dataset can be stored.

    Raises:
        ValueError: it has no ``cache_key``, or its clips differ between epochs.
    """
    if not isinstance(getattr(dataset, "cache_key", None), str):
        raise ValueError(
            f"{type(dataset).__name__} has no cache_key, which a cache needs to recognize its clips: give it one that "
            "names everything that a clip depends on, or use it without a cache."
        )
    if getattr(dataset, "varies_by_epoch", False):
        raise ValueError(
            f"{type(dataset).__name__} has varies_by_epoch=True and shows other frames in each epoch (sampler=random "
            "or frame=random): choose sampler=uniform or frame=middle, or use it without a cache."
        )


class _Builder(Dataset):
    """Dataset in which item k builds the k-th missing shard, so that DataLoader workers build them in parallel."""

    def __init__(self, clips: CachedClips, missing: list[int]):
        self._clips, self._missing = clips, missing

    def __len__(self) -> int:
        return len(self._missing)

    def __getitem__(self, k: int) -> int:
        self._clips._build(self._missing[k])
        return self._missing[k]


class _Shard:
    """Memory-mapped file with a valid CRC."""

    def __init__(self, data: mmap.mmap, table: dict, start: int):
        self._data, self._clips, self._start = data, table["clips"], start
        self.skipped: dict[str, str] = table["skipped"]

    def clip(self, position: int) -> dict:
        return self._restore(self._clips[position])

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
        start, offset = offset, offset + array.nbytes
        return {"array": [array.dtype.str, list(array.shape), start]}

    table = {"clips": [described(clip)["dict"] for clip in clips], "skipped": skipped}
    text = json.dumps(table).encode()
    payload = b"".join([text, *(array.tobytes() for array in arrays)])
    return _HEADER.pack(MAGIC, len(text), offset, zlib.crc32(payload)) + payload


def _load(path: Path) -> _Shard | None:
    """Returns the shard, or None if the file is missing, truncated or damaged."""
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
