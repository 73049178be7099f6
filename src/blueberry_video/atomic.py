"""Atomic writing of files and folders.

Content is written under a temporary name next to the destination, ``.<name>.tmp``, and renamed when it is complete. So
the destination holds either its old or its new content, also after a kill. An exception removes the temporary file; one
that a kill has left is overwritten by the next write.
"""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def explained_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Replaces an ``OSError`` of writing ``path`` with one of the same type and ``errno`` that names the fix.

    Args:
        path: the file or folder that is written.
        needed: its size in bytes, if known.

    Raises:
        OSError: for a full disk, missing permissions, a read-only file system, or a file in place of a folder.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or getattr(error.__cause__, "strerror", None)  # of a nested context
        folder = next(parent for parent in (path.parent, *path.absolute().parents) if parent.exists())
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            size = "" if needed is None else f" needs {needed} bytes"
            problem = f"{path}{size}, and {shutil.disk_usage(folder).free} bytes are free in {folder}"
            fix = "free some space, or use another disk, for example with output_dir=…; then resume with resume=last"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            problem, fix = f"{path} cannot be written", f"make {folder} writable, or use another folder"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            problem, fix = f"{path} cannot be created in {folder}", "move the file in its place, or use another folder"
        else:
            raise
        explained = type(error)(f"{reason}: {problem}. To continue, {fix}.")
        explained.errno = error.errno
        raise explained from error


@contextlib.contextmanager
def atomic_file(
    path: Path, unique: bool = False, sync_folder: bool = True, needed: int | None = None
) -> Iterator[BinaryIO]:
    """Opens a temporary file for writing; on exit syncs it to disk and renames it to ``path``.

    Args:
        path: the destination, in an existing folder; an existing file is replaced.
        unique: adds a random part to the temporary name, for destinations that several writers may write at once.
        sync_folder: also syncs the folder, so that the rename survives a power failure.
        needed: size in bytes, for the message on a full disk.

    Raises:
        OSError: if the disk is full or the folder is not writable.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp" if unique else f".{path.name}.tmp")
    with explained_errors(path, needed):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with contextlib.suppress(NotADirectoryError):
                temporary.unlink(missing_ok=True)
    if sync_folder:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically, see :func:`atomic_file`."""
    with atomic_file(path, needed=len(data)) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically, see :func:`atomic_file`."""
    write_bytes(path, text.encode())


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Creates an empty temporary folder to fill; on exit renames it to ``path``. Its files are not synced to disk.

    Raises:
        OSError: if ``path`` is a file or a folder that is not empty.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a writer that was killed
    with explained_errors(temporary):
        temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
