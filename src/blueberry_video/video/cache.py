"""Caches of processed videos in memory and on disk.

An entry is a dict of tensors and a metadata string. On disk it is a safetensors file with a CRC of the whole file in
its header, because safetensors detects truncated files but not flipped bits. Files are renamed to their final name only
after they are complete and synced, so that readers need no lock. Eviction takes a lock.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from blueberry_video.atomic import atomic_file
from blueberry_video.video.ranges import check_above_zero, check_at_least

Entry = tuple[dict[str, Tensor], str]

_CRC = re.compile(rb'"crc32":"([0-9a-f]{8})"')  # cannot occur inside a JSON string, where quotes are escaped
_NO_CRC = "00000000"
_ABANDONED_SECONDS = 3600  # age at which a temporary file is left over from a killed writer


@dataclass(frozen=True)
class CacheOptions:
    """Locations and size limits of the caches.

    Args:
        cache_memory_bytes: maximum size of the memory cache; 0 disables it.
        cache_folder: folder of the disk cache, which processes may share; None disables it. "~" is the home folder.
        cache_disk_bytes: maximum size of the disk cache, from which the least recently used files are removed; None
            for no limit.
    """

    cache_memory_bytes: int = 0
    cache_folder: str | None = None
    cache_disk_bytes: int | None = None

    def __post_init__(self) -> None:
        check_at_least(0, cache_memory_bytes=self.cache_memory_bytes)
        check_above_zero(cache_disk_bytes=self.cache_disk_bytes)
        if self.cache_folder == "":
            raise ValueError('cache_folder="" must not be empty: use null to disable the disk cache.')


def cache_key(content_hash: str, settings: Any, versions: Mapping[str, str]) -> str:
    """Returns a SHA-256 of content, settings and versions as 64 hexadecimal digits.

    Args:
        content_hash: hash of the bytes of the video.
        settings: JSON-serializable settings, else TypeError; the order of keys is irrelevant, a tuple equals a list.
        versions: versions of everything that affects pixels, such as the decoders.
    """
    try:
        text = json.dumps([content_hash, settings, dict(versions)], sort_keys=True, separators=(",", ":"))
    except TypeError as error:
        raise TypeError(
            f"settings must be JSON-serializable for a cache key ({error}): use dicts with str keys, lists, strings, "
            "numbers, booleans and None."
        ) from error
    return hashlib.sha256(text.encode()).hexdigest()


class MemoryCache:
    """Thread-safe LRU cache in memory, limited to ``max_bytes`` of tensors and metadata.

    ``put`` and ``get`` copy tensors (to the CPU), so that callers cannot modify an entry.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> Entry | None:
        """Returns the entry, or None."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
        return _copied(entry[0]), entry[1]  # stored tensors never change, so the copy needs no lock

    def put(self, key: str, tensors: Mapping[str, Tensor], metadata: str) -> None:
        """Stores an entry, replacing one with the same key. An entry larger than ``max_bytes`` is not stored."""
        size = _size((tensors, metadata))
        entry = (_copied(tensors), metadata) if size <= self.max_bytes else None
        with self._lock:
            old = self._entries.pop(key, None)
            if old is not None:
                self.used_bytes -= _size(old)
            if entry is None:
                return
            self._entries[key] = entry
            self.used_bytes += size
            while self.used_bytes > self.max_bytes:
                self.used_bytes -= _size(self._entries.popitem(last=False)[1])


class DiskCache:
    """LRU cache of files ``<hash of the key>.safetensors`` in a folder that processes may share.

    A truncated or damaged file is a miss and is removed. An unreadable file is a miss.

    Args:
        folder: created by the first ``put``.
        max_bytes: maximum size of all files. The ``put`` that exceeds it removes the least recently used files, by
            modification time, which a hit updates. None for no limit.
    """

    def __init__(self, folder: str | Path, max_bytes: int | None = None):
        self.folder = Path(folder).expanduser()
        self.max_bytes = max_bytes

    def path(self, key: str) -> Path:
        """Returns the path of the file for ``key``, which may not exist."""
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def get(self, key: str) -> Entry | None:
        """Returns the entry in newly allocated memory, or None."""
        path = self.path(key)
        try:
            data = path.read_bytes()
        except OSError:  # missing or unreadable
            return None
        metadata = _verified(data)
        if metadata is None or metadata["key"] != key:
            _remove(path)
            return None
        with contextlib.suppress(OSError):  # removed by another process, or a read-only cache
            os.utime(path)
        return safetensors.torch.load(data), metadata["metadata"]

    def put(self, key: str, tensors: Mapping[str, Tensor], metadata: str) -> None:
        """Writes an entry, replacing one with the same key. An entry larger than ``max_bytes`` is not stored.

        Raises:
            OSError: the disk is full, or the folder is not writable. No file remains.
        """
        data = _serialized(key, tensors, metadata)
        if self.max_bytes is not None and len(data) > self.max_bytes:
            _remove(self.path(key))
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.path(key), unique=True, sync_folder=False) as file:
                file.write(data)
            if self.max_bytes is not None:
                self._evict(self.max_bytes)
        except OSError as error:
            reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
            raise OSError(
                error.errno,
                f"The cache could not write {len(data)} bytes to cache_folder={self.folder} ({reason}): free space, "
                "set cache_disk_bytes, or use a different folder",
            ) from error

    def _evict(self, max_bytes: int) -> None:
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released on close, also after a crash
            files = []
            for found in os.scandir(self.folder):
                try:
                    status = found.stat()
                except FileNotFoundError:  # a temporary file that was renamed
                    continue
                if found.name.endswith(".safetensors"):
                    files.append((status.st_mtime_ns, status.st_size, found.path))
                elif found.name.endswith(".tmp") and time.time() - status.st_mtime > _ABANDONED_SECONDS:
                    _remove(Path(found.path))
            total = sum(size for _, size, _ in files)
            for _, size, path in sorted(files):
                if total <= max_bytes:
                    return
                _remove(Path(path))
                total -= size


class Cache:
    """Memory cache in front of a disk cache. Entries found on disk are also stored in memory."""

    def __init__(self, options: CacheOptions):
        self.memory = MemoryCache(options.cache_memory_bytes)
        self.disk = None if options.cache_folder is None else DiskCache(options.cache_folder, options.cache_disk_bytes)

    def get(self, key: str) -> Entry | None:
        """Returns a copy of the entry, or None."""
        entry = self.memory.get(key)
        if entry is None and self.disk is not None:
            entry = self.disk.get(key)
            if entry is not None:
                self.memory.put(key, *entry)
        return entry

    def put(self, key: str, tensors: Mapping[str, Tensor], metadata: str) -> None:
        """Stores an entry in memory and on disk. If :meth:`DiskCache.put` raises OSError, it is in memory only."""
        self.memory.put(key, tensors, metadata)
        if self.disk is not None:
            self.disk.put(key, tensors, metadata)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    copied = partial(Tensor.to, device="cpu", copy=True, memory_format=torch.contiguous_format)
    return {name: copied(tensor.detach()) for name, tensor in tensors.items()}


def _size(entry: tuple[Mapping[str, Tensor], str]) -> int:
    tensors, metadata = entry
    return sum(tensor.nbytes for tensor in tensors.values()) + len(metadata.encode())


def _serialized(key: str, tensors: Mapping[str, Tensor], metadata: str) -> bytearray:
    header = {"key": key, "metadata": metadata, "crc32": _NO_CRC}
    data = bytearray(safetensors.torch.save(_copied(tensors), header))
    [crc_field] = _CRC.finditer(data, 8, 8 + int.from_bytes(data[:8], "little"))
    data[slice(*crc_field.span(1))] = f"{zlib.crc32(data):08x}".encode()
    return data


def _verified(data: bytes) -> dict[str, str] | None:
    """Returns the metadata in the header of a file, or None if the CRC does not match."""
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    crc_field = _CRC.search(header)
    if crc_field is None:
        return None
    start, end = crc_field.start(1) + 8, crc_field.end(1) + 8
    crc = zlib.crc32(_NO_CRC.encode(), zlib.crc32(memoryview(data)[:start]))
    if zlib.crc32(memoryview(data)[end:], crc) != int(crc_field[1], 16):
        return None
    return json.loads(header)["__metadata__"]


def _remove(path: Path) -> None:
    """Removes a file if possible. A file that remains is overwritten or verified again later."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
