"""Job of the batch system in which this process runs: its identity, and its return to the queue. Slurm only."""

import os
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from blueberry_video.launch.signals import PREEMPTED, Interrupted

REQUEUE_VARIABLE = "BLUEBERRY_VIDEO_REQUEUE"
"""``1``: a run that the batch system ends puts its job into the queue again, after its checkpoint is saved."""

SECONDS = 30.0  # for a command of Slurm


def job(variables: Mapping[str, str] = os.environ) -> dict[str, Any] | None:
    """Returns the identity of the job, None outside of one.

    A requeued job has the same ``id`` and ``array``, the index in an array, and a larger ``restart``.
    """
    if not (number := variables.get("SLURM_ARRAY_JOB_ID") or variables.get("SLURM_JOB_ID")):
        return None
    index = variables.get("SLURM_ARRAY_TASK_ID") if "SLURM_ARRAY_JOB_ID" in variables else None
    return {
        "scheduler": "slurm",
        "cluster": variables.get("SLURM_CLUSTER_NAME"),
        "id": number,
        "array": index,
        "restart": int(variables.get("SLURM_RESTART_COUNT") or 0),
    }


def is_same(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Returns whether two processes ran in the same job, before or after it was requeued."""
    keys = ("scheduler", "cluster", "id", "array")
    return one is not None and other is not None and all(one.get(key) == other.get(key) for key in keys)


def is_continued(record: Mapping[str, Any] | None, current: Mapping[str, Any] | None) -> bool:
    """Returns whether a run belongs to an earlier start of the current job.

    Args:
        record: the job of the run.
        current: the job of this process.
    """
    return is_same(record, current) and bool(record and current and record.get("restart", 0) < current["restart"])


def requeue() -> bool:
    """Puts the job of this process into the queue again, if :data:`REQUEUE_VARIABLE` is set and the job was not
    canceled; returns whether it did. Slurm then ends the processes of the job."""
    current = job()
    if os.environ.get(REQUEUE_VARIABLE) != "1" or current is None:
        return False
    name = current["id"] if current["array"] is None else f"{current['id']}_{current['array']}"
    state = _slurm("squeue", "--noheader", "--format=%T %r", f"--jobs={name}")
    if state is not None and state.returncode == 0 and _is_canceled(state.stdout):
        return False
    result = _slurm("scontrol", "requeue", name)
    if result is None or result.returncode != 0:
        reason = "scontrol does not answer" if result is None else " ".join(result.stderr.split())
        warnings.warn(
            f"the job {name} is not requeued ({reason}): requeue it with `scontrol requeue {name}`, or submit the "
            "command again with `resume=last`.",
            stacklevel=2,
        )
        return False
    print(f"Requeued the job {name}: it continues this run.", flush=True)
    return True


def _is_canceled(state: str) -> bool:
    """Returns whether a job is ended by scancel, from its state and reason: while its processes end, the state is
    COMPLETING also after the time limit, which is then the reason."""
    return "CANCELLED" in state or ("COMPLETING" in state and "TimeLimit" not in state)


@contextmanager
def requeued(follows: bool) -> Iterator[None]:
    """Context manager that requeues the job after a signal of the batch system ended the ``with`` block.

    Args:
        follows: do nothing, in a process of a run that a different process leads.
    """
    try:
        yield
    except Interrupted as error:
        if not follows and error.code == PREEMPTED:
            requeue()
        raise


def _slurm(*command: str) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
