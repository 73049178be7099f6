"""Local cache of tar shards, shared by the processes of a machine.

    <folder>/<key>/train-000000.tar   a shard; where only some of its clips were read, a sparse file with these
    <folder>/<key>/index.safetensors
    <folder>/.used                    bytes in use, under a lock

Readers check the tar header and the CRC of every clip, so a part that is absent, half written or damaged is a miss.
Files may therefore be written without waiting for other readers and removed at any time.
"""

import contextlib
import errno
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from blueberry_video.atomic import atomic_file
from blueberry_video.data.shard_index import INDEX, Shard
from blueberry_video.data.shard_store import Store, read_at

GB = 10**9
_PAGE = 4096  # granularity of the disk space of a sparse file
_PIECE = 1 << 25  # bytes of a request for a whole shard
_KEPT_SHARE = 0.9  # of the limit, after files were removed
_ABANDONED = 3600  # seconds after which a temporary file is one that a killed process left


class ShardCache:
    """Cache of one folder of shards.

    Args:
        folder: folder on a local disk; several folders of shards may share it.
        gigabytes: limit on its size, in units of 10⁹ bytes; the shards that were not read for the longest time are
            removed.
        fetch: bytes that a miss reads: ``clip``, or the whole ``shard``.
        store: the folder of shards.
        key: name of its folder in the cache.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, folder: str | Path, gigabytes: float, fetch: Literal["clip", "shard"], store: Store, key: str):
        if fetch not in ("clip", "shard"):
            raise ValueError(f"cache_fetch={fetch!r} is neither 'clip' nor 'shard': use one of these.")
        if not gigabytes > 0:
            raise ValueError(f"cache_gb={gigabytes} must be above 0, or set cache=null to read without a cache.")
        self.top, self.folder = Path(folder), Path(folder) / key
        self.limit, self.fetch, self.store = int(gigabytes * GB), fetch, store
        self.folder.mkdir(parents=True, exist_ok=True)
        self._full = False

    def index(self) -> Path:
        """Returns the local copy of the index; the first process reads it and the others wait."""
        path = self.folder / INDEX
        with locked(self.folder / f"{INDEX}.lock"):
            if not path.exists():
                with atomic_file(path) as file:
                    self.store.download(INDEX, Path(file.name))
        return path

    def read(self, shard: Shard, start: int, end: int, valid: Callable[[bytes], bool]) -> bytes:
        """Returns the bytes of a shard from ``start`` to ``end``. If they are not ``valid`` in the cache, reads them
        from the store, and keeps them if they are valid."""
        data = self._cached(shard, start, end)
        if data is not None and valid(data):
            return data
        if self.fetch == "shard" and shard.bytes <= self.limit * _KEPT_SHARE:
            self._fetch_shard(shard, lambda: (found := self._cached(shard, start, end)) is not None and valid(found))
            data = self._cached(shard, start, end)
            if data is not None and valid(data):
                return data
        data = self.store.read(shard.name, start, end)
        if valid(data):
            with self._room_or_warning():
                self._keep(shard, start, data)
        return data

    def used(self) -> int:
        """Returns the disk space of the cached shards in bytes."""
        return sum(size for _, size, _ in self._files())

    def _cached(self, shard: Shard, start: int, end: int) -> bytes | None:
        path = self.folder / shard.name
        try:
            descriptor = os.open(path, os.O_RDONLY)  # not kept open: the space of a removed file would stay in use
        except FileNotFoundError:
            return None
        try:
            data = read_at(descriptor, start, end)
        finally:
            os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):  # removed by another process
            os.utime(path)  # time of the last use
        return data

    def _keep(self, shard: Shard, start: int, data: bytes) -> None:
        pages = -(-(start + len(data)) // _PAGE) - start // _PAGE
        with self._reserved(pages * _PAGE):
            descriptor = os.open(self.folder / shard.name, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if os.fstat(descriptor).st_size < shard.bytes:
                    os.ftruncate(descriptor, shard.bytes)
                written = 0
                while written < len(data):
                    written += os.pwrite(descriptor, memoryview(data)[written:], start + written)
            finally:
                os.close(descriptor)

    def _fetch_shard(self, shard: Shard, is_there: Callable[[], bool]) -> None:
        path = self.folder / shard.name
        with locked(self.folder / f"{shard.name}.lock"), self._room_or_warning():
            if is_there():  # another process has read it meanwhile
                return
            with atomic_file(path, sync_folder=False) as file:
                with self._reserved(-(-shard.bytes // _PAGE) * _PAGE):
                    file.truncate(shard.bytes)  # counted from now on
                for start in range(0, shard.bytes, _PIECE):
                    file.write(self.store.read(shard.name, start, min(start + _PIECE, shard.bytes)))

    @contextlib.contextmanager
    def _reserved(self, size: int) -> Iterator[None]:
        """Makes room for bytes, by removing files if necessary, and holds the lock while they are allocated."""
        with locked(self.top / ".used") as file:
            text = os.pread(file, 32, 0).strip(b"\0 ")
            used = int(text) if text.isdigit() else self.used()
            if used + size > self.limit:
                used = self._evict(max(0, int(self.limit * _KEPT_SHARE) - size))
            yield
            os.pwrite(file, f"{used + size:<32}".encode(), 0)

    def _evict(self, limit: int) -> int:
        """Removes the files with the oldest last use until at most ``limit`` bytes are in use; returns their number."""
        files = sorted(self._files())
        used = sum(size for _, size, _ in files)
        for last_use, size, path in files:
            is_temporary = path.suffix == ".tmp"
            if is_temporary and time.time() - last_use < _ABANDONED:
                continue  # being written
            if used > limit or is_temporary:
                path.unlink(missing_ok=True)
                used -= size
        return used

    def _files(self) -> list[tuple[float, int, Path]]:
        """Returns (time of last use, disk space, path) of the shards in the cache."""
        found = {}
        for pattern in ("*/.*.tar.tmp", "*/*.tar"):  # in this order, a file that is renamed meanwhile is not missed
            for path in self.top.glob(pattern):
                with contextlib.suppress(FileNotFoundError):  # removed by another process
                    stat = path.stat()
                    size = stat.st_size if path.suffix == ".tmp" else stat.st_blocks * 512  # a shard is sparse
                    found[stat.st_ino] = (stat.st_mtime, size, path)  # once, under its last name
        return list(found.values())

    @contextlib.contextmanager
    def _room_or_warning(self) -> Iterator[None]:
        """Continues without keeping the bytes if the disk of the cache is full, with one warning."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not self._full:
                print(
                    f"the disk of cache={self.top} is full below cache_gb={self.limit / GB:g}, so further clips are "
                    "read without the cache: free some space, or lower cache_gb",
                    file=sys.stderr,
                    flush=True,
                )
            self._full = True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """Holds the lock of a file, which is created; yields its descriptor. A crash releases the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)
