"""Folder of files on a local disk or in object storage, read by byte ranges with fsspec."""

import errno
import os
import random
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from blueberry_video.installation import install_command

PROTOCOLS = {"file": "", "memory": "", "s3": "s3", "gs": "gs"}  # protocol -> extra of pyproject.toml that reads it
WAITS = (0.5, 1, 2, 4, 8, 16)  # seconds before each further try of a request that failed
_NETWORK = ("aiohttp", "aiobotocore", "botocore", "urllib3", "gcsfs")  # modules of errors that a further try may mend
_NO_RETRY = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError")
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of this machine
_MAX_OPEN = 128  # open local files per process
Result = TypeVar("Result")


class Store:
    """Folder of files. Requests that fail because of the network are repeated.

    The connections are opened on first use in each process, so that an object can be pickled and used after a fork.

    Args:
        url: path of a local folder, or a URL ``s3://bucket/folder``, ``gs://bucket/folder`` or ``memory://folder``.
            Credentials and the address of the server are those of the environment (``AWS_ENDPOINT_URL``).

    Raises:
        ValueError: a URL with a different protocol.
        ImportError: the package for the protocol is not installed.
    """

    def __init__(self, url: str | Path):
        self.url = str(url).rstrip("/") or "/"
        protocol = self.url.partition("://")[0] if "://" in self.url else "file"
        if protocol not in PROTOCOLS or "::" in self.url:
            raise ValueError(
                f"{self.url} has the protocol {protocol!r}, which is not read: use a local path, or a URL with "
                f"{', '.join(f'{name}://' for name in PROTOCOLS)}."
            )
        self.protocol = protocol
        self.local = Path(self.url.removeprefix("file://")) if protocol == "file" else None
        self._files: OrderedDict[str, int] = OrderedDict()
        if self.local is None:
            self._remote()  # a missing package raises before a run starts

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)

    def path(self, name: str) -> str:
        """Returns the full path or URL of a file."""
        return f"{self.url}/{name}"

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Returns a file, or its bytes from ``start`` to ``end``; fewer if the file is shorter.

        Raises:
            FileNotFoundError: there is no such file.
            PermissionError: it must not be read.
            ConnectionError: the network failed in every try.
        """
        if self.local is not None and start is not None and end is not None:
            return self._read_local(name, start, end)
        if self.local is not None:
            return (self.local / name).read_bytes()
        return self._tried(f"reading {self.path(name)}", lambda fs: fs.cat_file(self.path(name), start=start, end=end))

    def download(self, name: str, path: Path) -> None:
        """Copies a file to a local path; raises as :meth:`read`."""
        if self.local is not None:
            self._copy(self.local / name, path)
        else:
            self._tried(f"reading {self.path(name)}", lambda fs: fs.get_file(self.path(name), str(path)))

    def upload(self, path: Path, name: str) -> None:
        """Copies a local file to a remote store, where it appears when it is complete; raises as :meth:`read`."""
        self._tried(f"writing {self.path(name)}", lambda fs: fs.put_file(str(path), self.path(name)))

    def write(self, name: str, data: bytes) -> None:
        """Writes a file to a remote store; raises as :meth:`read`."""
        self._tried(f"writing {self.path(name)}", lambda fs: fs.pipe_file(self.path(name), data))

    def remove(self, name: str) -> None:
        """Removes a file or a folder of a remote store, if it exists."""

        def work(fs: Any) -> None:
            if fs.exists(self.path(name)):
                fs.rm(self.path(name), recursive=True)

        self._tried(f"removing {self.path(name)}", work)

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Returns name -> bytes of the files directly in the store, or in one of its folders; empty without folder."""
        if self.local is not None:
            top = self.local / folder
            found = list(os.scandir(top)) if top.is_dir() else []
            return {entry.name: entry.stat().st_size for entry in found if entry.is_file()}
        url = self.path(folder).rstrip("/")

        def work(fs: Any) -> list[dict]:
            fs.invalidate_cache()
            return fs.ls(url, detail=True) if fs.isdir(url) else []

        listed = self._tried(f"listing {url}", work)
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in listed if entry["type"] == "file"}

    def _remote(self) -> Any:
        try:
            return fsspec.filesystem(self.protocol)  # one object per process: fsspec opens a new one after a fork
        except ImportError as error:
            raise ImportError(
                f"{self.url} cannot be read ({error}): run `{install_command(PROTOCOLS[self.protocol])}`."
            ) from error

    def _tried(self, what: str, work: Callable[[Any], Result]) -> Result:
        """Returns ``work`` of the file system; repeats it after an error of the network."""
        for wait in (*WAITS, None):
            try:
                return work(self._remote())
            except (FileNotFoundError, PermissionError, IsADirectoryError):
                raise
            except Exception as error:
                if not _is_of_network(error):
                    raise
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                if wait is None:
                    raise ConnectionError(
                        f"{what} failed {len(WAITS) + 1} times within {sum(WAITS):g} s ({reason}): check the network, "
                        "the address (AWS_ENDPOINT_URL) and the credentials, then repeat the command; a run continues "
                        "with resume=last."
                    ) from error
                print(f"{what} failed ({reason}); trying again in {wait:g} s", file=sys.stderr, flush=True)
                time.sleep(wait * random.Random().uniform(0.8, 1.2))  # not the global generator, which is seeded
        raise AssertionError("unreachable")

    def _read_local(self, name: str, start: int, end: int) -> bytes:
        assert self.local is not None
        descriptor = self._files.get(name)
        if descriptor is None:
            descriptor = os.open(self.local / name, os.O_RDONLY)
            if len(self._files) >= _MAX_OPEN:
                os.close(self._files.popitem(last=False)[1])
            self._files[name] = descriptor
        else:
            self._files.move_to_end(name)
        return read_at(descriptor, start, end)

    def _copy(self, source: Path, target: Path) -> None:
        with source.open("rb") as read, target.open("wb") as write:
            while piece := read.read(1 << 22):
                write.write(piece)


def read_at(descriptor: int, start: int, end: int) -> bytes:
    """Returns the bytes of an open file from ``start`` to ``end``, without moving its position."""
    pieces, position = [], start
    while position < end:
        piece = os.pread(descriptor, end - position, position)
        if not piece:
            break
        pieces.append(piece)
        position += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _is_of_network(error: Exception) -> bool:
    """Returns true for errors that a further try may mend."""
    if type(error).__name__ in _NO_RETRY or (isinstance(error, OSError) and error.errno in _LOCAL):
        return False
    return isinstance(error, OSError | TimeoutError) or type(error).__module__.partition(".")[0] in _NETWORK
