"""Processed videos, kept: the newest in memory, all on disk.

An entry is a dict of tensors and a text of metadata. On disk it is one safetensors file, which other programs can read,
with a CRC of the whole file in its header: safetensors itself notices a torn file, but not a flipped bit. A file gets
its name only when it is complete and synced, so that readers need no lock; evicting happens under one.
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
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from blueberry_video.atomic import atomic_file

Entry = tuple[dict[str, Tensor], str]

_CRC = re.compile(rb'"crc32":"([0-9a-f]{8})"')  # cannot occur inside a JSON string, which escapes its quotes
_NO_CRC = "00000000"
_ABANDONED_SECONDS = 3600  # a temporary file of this age belongs to a writer that was killed


@dataclass(frozen=True)
class CacheOptions:
    """Where processed videos are kept.

    Args:
        cache_memory_bytes: bytes of tensors kept in this process, 0 for none.
        cache_folder: a folder on disk, which processes may share, or None for none; "~" is the home folder.
        cache_disk_bytes: bytes that the files in that folder may take, the least recently used being removed; None
            for no bound.
    """

    cache_memory_bytes: int = 0
    cache_folder: str | None = None
    cache_disk_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.cache_memory_bytes < 0:
            raise ValueError(f"cache_memory_bytes={self.cache_memory_bytes} is negative: use 0 for no cache in memory.")
        if self.cache_disk_bytes is not None and self.cache_disk_bytes < 1:
            raise ValueError(
                f"cache_disk_bytes={self.cache_disk_bytes} leaves no room: use null for no bound, or cache_folder=null "
                "for no cache on disk."
            )
        if self.cache_folder == "":
            raise ValueError('cache_folder="" names no folder: use null for no cache on disk.')


def cache_key(content_hash: str, settings: Any, versions: Mapping[str, str]) -> str:
    """64 hexadecimal digits that change when the content, any setting or any version does.

    Args:
        content_hash: of the bytes of the video.
        settings: whatever JSON can express; the order of a dict's keys does not matter, a tuple is a list.
        versions: of everything that decides about pixels, such as the decoders.

    Raises:
        TypeError: settings hold something that JSON cannot express.
    """
    try:
        text = json.dumps([content_hash, settings, dict(versions)], sort_keys=True, separators=(",", ":"))
    except TypeError as error:
        raise TypeError(
            f"These settings cannot be part of a cache key ({error}): use dicts with text keys, lists, texts, numbers, "
            "booleans and None."
        ) from error
    return hashlib.sha256(text.encode()).hexdigest()


class MemoryCache:
    """The most recently used entries, in at most ``max_bytes`` of tensors and metadata. Threads may share it.

    Tensors are copied to the CPU on the way in and copied on the way out: changing them changes no entry.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> Entry | None:
        """The entry, or None where there is none (any more)."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
        return _copied(entry[0]), entry[1]  # nobody changes what is stored: copied without the lock

    def put(self, key: str, tensors: Mapping[str, Tensor], metadata: str) -> None:
        """Keeps an entry, in the place of an older one of that key; not one that is larger than the whole cache."""
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
    """Entries as files ``<hash of the key>.safetensors`` of a folder that processes may share.

    A file that is torn or damaged counts as a miss and is removed; one that may not be read counts as a miss.

    Args:
        folder: is made by the first ``put``.
        max_bytes: of all files together; the least recently used are removed by the ``put`` that goes over it. Hits
            are remembered in the files' modification times. None for no bound.
    """

    def __init__(self, folder: str | Path, max_bytes: int | None = None):
        self.folder = Path(folder).expanduser()
        self.max_bytes = max_bytes

    def path(self, key: str) -> Path:
        """Where the entry of ``key`` lies, if it does."""
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def get(self, key: str) -> Entry | None:
        """The entry, in memory of its own, or None."""
        path = self.path(key)
        try:
            data = path.read_bytes()
        except OSError:  # none, or none for us
            return None
        metadata = _verified(data)
        if metadata is None or metadata["key"] != key:
            _remove(path)
            return None
        with contextlib.suppress(OSError):  # removed meanwhile, or a cache that may only be read
            os.utime(path)
        return safetensors.torch.load(data), metadata["metadata"]

    def put(self, key: str, tensors: Mapping[str, Tensor], metadata: str) -> None:
        """Writes an entry, in the place of an older one of that key; not one that is larger than the whole cache.

        Raises:
            OSError: the disk is full, or the folder may not be written to; no file is left behind.
        """
        data = _file(key, tensors, metadata)
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
                f"The cache could not write {len(data)} bytes to cache_folder={self.folder} ({reason}): free some "
                "space, set cache_disk_bytes, or choose another folder",
            ) from error

    def _evict(self, max_bytes: int) -> None:
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when closed, also by a crash
            files = []
            for found in os.scandir(self.folder):
                try:
                    status = found.stat()
                except FileNotFoundError:  # a writer has renamed its temporary file
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
    """What ``CacheOptions`` ask for: memory before disk; what was found on disk is then kept in memory."""

    def __init__(self, options: CacheOptions):
        self.memory = MemoryCache(options.cache_memory_bytes)
        self.disk = None if options.cache_folder is None else DiskCache(options.cache_folder, options.cache_disk_bytes)

    def get(self, key: str) -> Entry | None:
        """The entry or None. Its tensors are the caller's: changing them changes no entry."""
        entry = self.memory.get(key)
        if entry is None and self.disk is not None:
            entry = self.disk.get(key)
            if entry is not None:
                self.memory.put(key, *entry)
        return entry

    def put(self, key: str, tensors: Mapping[str, Tensor], metadata: str) -> None:
        """Keeps an entry in memory and on disk.

        Raises:
            OSError: as ``DiskCache.put``; the entry is in memory nonetheless.
        """
        self.memory.put(key, tensors, metadata)
        if self.disk is not None:
            self.disk.put(key, tensors, metadata)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _size(entry: tuple[Mapping[str, Tensor], str]) -> int:
    tensors, metadata = entry
    return sum(tensor.nbytes for tensor in tensors.values()) + len(metadata.encode())


def _file(key: str, tensors: Mapping[str, Tensor], metadata: str) -> bytearray:
    texts = {"key": key, "metadata": metadata, "crc32": _NO_CRC}
    data = bytearray(safetensors.torch.save(_copied(tensors), texts))
    [place] = _CRC.finditer(data, 8, 8 + int.from_bytes(data[:8], "little"))
    data[slice(*place.span(1))] = f"{zlib.crc32(data):08x}".encode()
    return data


def _verified(data: bytes) -> dict[str, str] | None:
    """The texts of a file's header, or None where the file is not as it was written."""
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    place = _CRC.search(header)
    if place is None:
        return None
    start, end = place.start(1) + 8, place.end(1) + 8
    crc = zlib.crc32(_NO_CRC.encode(), zlib.crc32(memoryview(data)[:start]))
    if zlib.crc32(memoryview(data)[end:], crc) != int(place[1], 16):
        return None
    return json.loads(header)["__metadata__"]


def _remove(path: Path) -> None:
    """Removes a file where that is possible; one that stays is written over or judged again."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
