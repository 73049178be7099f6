"""Failures of the processes of a run, and which of them came first."""

import os
import re
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Self

from blueberry_video.launch.errors import TRACEBACK_VARIABLE, paragraph

LOST_PEER = re.compile(  # errors of a rank that lost the connection to a different one
    r"Connection (closed|reset|refused)|Broken pipe|\bgloo\b|NCCL|DistNetworkError|DistBackendError", re.IGNORECASE
)


class LostRankError(RuntimeError):
    """Failure of a different rank than this one."""


class Failure(NamedTuple):
    """Failure of a rank.

    Attributes:
        rank: its number.
        time: seconds since the epoch.
        error: type and message.
        text: traceback; empty for errors that need none.
        reported: whether the rank reported it; False if a different process noticed it.
    """

    rank: int
    time: float
    error: str
    text: str = ""
    reported: bool = True

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Self:
        """Failure of this process, which ``error`` ended."""
        message = None if os.environ.get(TRACEBACK_VARIABLE) == "1" else paragraph(error)
        text = "" if message else "".join(traceback.format_exception(error))
        described = " ".join((message or str(error) or "no message").split()).rstrip(".")
        return cls(rank, time.time(), f"{type(error).__name__}: {described}.", text)

    def named(self) -> str:
        """Sentence with the rank and the error."""
        return f"rank {self.rank} failed first: {self.error}"


def first_cause(failures: Iterable[Failure]) -> Failure:
    """Returns the failure that caused the others: the earliest error, of a rank that did not only lose a different one,
    before ranks that ended without an error."""

    def order(failure: Failure) -> tuple[int, float]:
        return (1 if not failure.reported else 2 if LOST_PEER.search(failure.error) else 0), failure.time

    return min(failures, key=order)


def is_stopped(process: int) -> bool:
    """Returns whether a process is stopped by a signal or a debugger; False where /proc does not exist."""
    return _state(process) in ("T", "t")


def has_ended(process: int) -> bool:
    """Returns whether a process has ended; False where /proc does not exist."""
    return Path("/proc/self").exists() and _state(process) in ("", "Z", "X")


def _state(process: int) -> str:
    """Returns the letter of a process's state in /proc; empty if there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return ""
