"""Folder of a sweep or of a submission: ``sweep.json``, ``points/``, ``logs/``, and a lock."""

import fcntl
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from blueberry_video.atomic import explained_errors, write_text
from blueberry_video.launch import points


class SweepFolder:
    """Folder of a sweep.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: BinaryIO | None = None

    @classmethod
    def create(cls, path: Path, records: Sequence[dict[str, Any]], **values: Any) -> "SweepFolder":
        """Creates a folder, with a number appended if it exists, and the records of its points.

        Args:
            path: the folder.
            records: the points, see :func:`points.describe`; none if a sweeper chooses them during the sweep.
            values: contents of ``sweep.json``.
        """
        sweep = cls(_make_folder(path))
        sweep.lock()
        for record in records:
            points.write(points.file_of(sweep.path, record["number"]), record)
        sweep.write({**values, "started": now(), "ended": None, "retry": False, "fail_fast": False})
        return sweep

    @property
    def record(self) -> dict[str, Any]:
        """The contents of ``sweep.json``; empty if there is none."""
        file = self.path / "sweep.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def write(self, record: dict[str, Any]) -> None:
        write_text(self.path / "sweep.json", json.dumps(record, indent=2))

    def update(self, **values: Any) -> None:
        """Replaces values of ``sweep.json``."""
        self.write({**self.record, **values})

    def lock(self) -> bool:
        """Locks the folder until this process ends; returns False if a different process has locked it."""
        file = (self.path / ".lock").open("a+b")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            return False
        except OSError:  # a file system without locks
            file.close()
            return True
        self._lock = file
        return True

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def is_running(self) -> bool:
        """Returns whether a different process has locked the folder."""
        file = self.path / ".lock"
        if self._lock is not None or not file.is_file():
            return False
        with file.open("r+b") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return True
            except OSError:
                return False
        return False

    def states(self) -> list[str]:
        return [record["state"] for record in points.read(self.path)]


def _make_folder(path: Path) -> Path:
    """Creates a folder; if it exists, one with a number appended. Safe if several processes do so at once."""
    for attempt in range(1, 1000):
        folder = path if attempt == 1 else path.with_name(f"{path.name}_{attempt}")
        with explained_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                folder.mkdir()
            except FileExistsError:
                continue
        return folder
    raise FileExistsError(f"{path} exists already 999 times: choose a different folder with hydra.sweep.dir=….")


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="microseconds")
