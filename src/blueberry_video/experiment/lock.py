"""Lock of a run folder: one process at a time trains in it."""

import fcntl
import json
import os
import platform
import threading
import time
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from blueberry_video.launch import scheduler

FILE = ".lock"
BEAT_SECONDS = 20.0
STALE_SECONDS = 90.0  # without a sign of life of a process on a different machine
SETTLE_SECONDS = 1.0  # without locks of the file system, for a process that starts at the same time


class RunLock:
    """Exclusive lock of a run folder, released by :meth:`release` and when the process ends, also by a kill.

    A POSIX record lock: it is not inherited by the workers of a DataLoader, which may outlive a killed process for some
    seconds. Byte 0 belongs to the process that the user started, byte 1 to rank 0 of several processes.

    File systems of clusters may have no locks, or only between processes of one machine. Therefore the file names its
    owner: host, process, start time and job. Its time is set every ``BEAT_SECONDS``: an owner on a different machine is
    alive until ``STALE_SECONDS`` after the last one, unless it was an earlier start of the current job.

    Args:
        folder: the run folder.
        rank: lock as rank 0 of a run that another process started.

    Raises:
        BlockingIOError: if another process trains in the folder; the message names it.
    """

    def __init__(self, folder: Path, rank: bool = False) -> None:
        self._file: BinaryIO | None = None
        self._owner: dict[str, Any] = {}
        self._released = threading.Event()
        path = folder / FILE
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        has_locks = True
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(rank))
            if not rank:  # ranks of a killed process may still be training
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1)
                fcntl.lockf(file, fcntl.LOCK_UN, 1, 1)
        except (BlockingIOError, PermissionError):
            error = _in_use(folder, _read(file))
            file.close()
            raise error from None
        except OSError as error:
            has_locks = False
            warnings.warn(
                f"{path} cannot be locked ({error}): a second process is recognized by the contents of the file.",
                stacklevel=2,
            )
        try:
            if not rank:
                self._own(file, folder, has_locks)
        except BaseException:
            file.close()
            raise
        self._file = file
        threading.Thread(target=self._beat, args=(file.fileno(),), daemon=True).start()

    def release(self) -> None:
        self._released.set()
        if self._file is not None:
            if self._owner:
                _write(self._file, {**self._owner, "released": True})
            self._file.close()
            self._file = None

    def _own(self, file: BinaryIO, folder: Path, has_locks: bool) -> None:
        """Names this process as the owner, if there is no other that is alive."""
        owner = _read(file)
        elsewhere = owner.get("host") not in (None, platform.node())
        if _is_alive(owner, _age(folder) if elsewhere else 0.0, has_locks):
            raise _in_use(folder, owner)
        this = {
            "pid": os.getpid(),
            "host": platform.node(),
            "since": datetime.now().isoformat(timespec="seconds"),
            "start": _start_time(os.getpid()),
            "job": scheduler.job(),
        }
        _write(file, this)
        self._owner = this
        if not has_locks:
            time.sleep(SETTLE_SECONDS)
            if (owner := _read(file)) != this:
                raise _in_use(folder, owner)

    def _beat(self, file: int) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                os.utime(file)
            except OSError:  # closed, or removed with its folder
                return


def check_unlocked(folder: Path) -> None:
    """Checks that no other process trains in a run folder, without locking it or changing its files.

    Raises:
        BlockingIOError: if one does; the message names it.
    """
    path = folder / FILE
    if not path.is_file():
        return
    with path.open("rb") as file:
        has_locks = True
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB, 2)  # released by closing the file
        except (BlockingIOError, PermissionError):
            raise _in_use(folder, _read(file)) from None
        except OSError:  # a file system without locks
            has_locks = False
        owner = _read(file)
        age = time.time() - path.stat().st_mtime
        if _is_alive(owner, age, has_locks):
            raise _in_use(folder, owner)


def _is_alive(owner: dict[str, Any], age: float, has_locks: bool) -> bool:
    """Returns whether the owner of a lock that this process could get is alive.

    Args:
        owner: contents of the lock file.
        age: seconds since its last sign of life.
        has_locks: whether the file system has locks, at least between processes of this machine.
    """
    if not {"host", "pid"} <= owner.keys() or owner.get("released"):
        return False
    if owner["host"] == platform.node():
        started = _start_time(owner["pid"])
        return not has_locks and started is not None and started == owner.get("start") and owner["pid"] != os.getpid()
    return age < STALE_SECONDS and not scheduler.is_continued(owner.get("job"), scheduler.job())


def _age(folder: Path) -> float:
    """Returns the seconds since the lock file was changed, by the clock of the file system."""
    now = folder / f"{FILE}.{platform.node()}.{os.getpid()}"
    try:
        now.touch()
        return now.stat().st_mtime - (folder / FILE).stat().st_mtime
    finally:
        now.unlink(missing_ok=True)


def _start_time(process: int) -> int | None:
    """Returns the start time of a process in ticks since the start of the machine; None if it does not run."""
    try:
        return int(Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def _read(file: BinaryIO) -> dict[str, Any]:
    """Returns the owner in a lock file; empty if there is none."""
    file.seek(0)
    try:
        owner = json.loads(file.read())
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _write(file: BinaryIO, owner: dict[str, Any]) -> None:
    """Replaces the owner in place, so that a full disk has room for it."""
    file.seek(0)
    file.truncate(file.write(json.dumps(owner).encode()))


def _in_use(folder: Path, owner: dict[str, Any]) -> BlockingIOError:
    return BlockingIOError(
        f"the run {folder} is in use by {_named(owner)}: wait until that process ends, or end it, and then resume. A "
        f"process on a different machine that was killed counts as running for {STALE_SECONDS:.0f} s."
    )


def _named(owner: dict[str, Any]) -> str:
    if not {"pid", "host", "since"} <= owner.keys():
        return "another process"
    return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
