"""Lock of a run folder: one process at a time trains in it."""

import fcntl
import json
import os
import platform
import warnings
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

FILE = ".lock"


class RunLock:
    """Exclusive lock of a run folder, released by :meth:`release` and when the process ends, also by a kill.

    A POSIX record lock: it is not inherited by the workers of a DataLoader, which may outlive a killed process for some
    seconds. Byte 0 belongs to the process that the user started, byte 1 to rank 0 of several processes.

    Args:
        folder: the run folder.
        rank: lock as rank 0 of a run that another process started.

    Raises:
        BlockingIOError: if another process trains in the folder; the message names it.
    """

    def __init__(self, folder: Path, rank: bool = False) -> None:
        self._file: BinaryIO | None = None
        path = folder / FILE
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(rank))
            if not rank:  # ranks of a killed process may still be training
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1)
                fcntl.lockf(file, fcntl.LOCK_UN, 1, 1)
        except (BlockingIOError, PermissionError):
            error = _in_use(folder, file.read())
            file.close()
            raise error from None
        except OSError as error:
            warnings.warn(f"{path} cannot be locked ({error}): do not resume this run twice at once.", stacklevel=2)
            file.close()
            return
        self._file = file
        this = {"pid": os.getpid(), "host": platform.node(), "since": datetime.now().isoformat(timespec="seconds")}
        file.truncate(0)
        file.write(json.dumps(this).encode())

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def check_unlocked(folder: Path) -> None:
    """Checks that no other process trains in a run folder, without locking it or changing its files.

    Raises:
        BlockingIOError: if one does; the message names it.
    """
    path = folder / FILE
    if not path.is_file():
        return
    with path.open("rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB, 2)  # released by closing the file
        except (BlockingIOError, PermissionError):
            raise _in_use(folder, file.read()) from None
        except OSError:  # a file system without locks
            return


def _in_use(folder: Path, content: bytes) -> BlockingIOError:
    return BlockingIOError(
        f"the run {folder} is in use by {_owner(content)}: wait until that process ends, or end it, and then resume."
    )


def _owner(content: bytes) -> str:
    try:
        owner = json.loads(content)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
