"""States of submitted jobs and of points: from Slurm, the records of points, and locks."""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blueberry_video.launch import points
from blueberry_video.launch.sweep_folder import SweepFolder

SECONDS = 15.0  # for a command of Slurm
PENDING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STAGE_OUT", "RESIZING", "SIGNALING", "STOPPED")
FAILED = ("FAILED", "OUT_OF_MEMORY", "BOOT_FAIL", "LAUNCH_FAILED")
# others, as CANCELLED, TIMEOUT, PREEMPTED, NODE_FAIL and DEADLINE, are interruptions


def slurm_states() -> dict[str, str] | None:
    """Returns the state of each job of this user that Slurm knows, ``<id>`` or ``<id>_<index>``; None without Slurm."""
    queued = _run("squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T")
    accounted = _run("sacct", "--noheader", "--parsable2", "--allocations", "--array", "--format=JobID,State")
    if queued is None and accounted is None:
        return None
    states = {}
    for line in [*(accounted or "").splitlines(), *(queued or "").splitlines()]:  # squeue is newer
        job, _, state = line.partition("|")
        states[job.strip()] = state.split()[0] if state.split() else ""
    return states


def states_of(folder: Path, slurm: Mapping[str, str] | None) -> dict[int, str]:
    """Returns the state of each point of a sweep or of a submission: ``pending``, ``running``, ``finished``,
    ``failed``, ``interrupted``, or ``lost``: its process ended without a record.

    Args:
        folder: the folder.
        slurm: see :func:`slurm_states`; None: the states are those of the records.
    """
    sweep = SweepFolder(folder)
    record = sweep.record
    is_slurm = record.get("executor") == "slurm"
    alive = not is_slurm and sweep.is_running()
    return {
        point["number"]: _of_job(point, slurm, record.get("jobs", {}))
        if is_slurm
        else _of_process(point, alive, record)
        for point in points.read(folder)
    }


def _of_job(point: Mapping[str, Any], slurm: Mapping[str, str] | None, jobs: Mapping[str, str]) -> str:
    """Returns the state of a point that is a job of Slurm."""
    state = point["state"]
    if state == "finished" or slurm is None:
        return state
    job = slurm.get(jobs.get(str(point["number"]), ""), "")
    if job in PENDING:
        return "pending"
    if job in RUNNING:
        return "failed" if state == "failed" else "running"
    if state in ("pending", "running"):  # the job has ended
        return "failed" if job in FAILED else "interrupted" if job not in ("", "COMPLETED") else "lost"
    return state


def _of_process(point: Mapping[str, Any], alive: bool, sweep: Mapping[str, Any]) -> str:
    """Returns the state of a point that is a process of this machine.

    Args:
        point: its record.
        alive: whether a process runs the sweep.
        sweep: ``sweep.json``.
    """
    if alive or point["state"] not in ("pending", "running"):
        return point["state"]
    return "lost" if point["state"] == "running" or sweep.get("jobs") else "pending"


def _run(*command: str) -> str | None:
    """Returns the output of a command; None if it is missing, or fails, as ``sacct`` without accounting."""
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None
    return result.stdout if result.returncode == 0 else None
