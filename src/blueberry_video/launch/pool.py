"""Parallel points of a sweep on one machine: one process each, at most a number of them at once.

    python -m blueberry_video.launch.pool <submission>

runs the points that the folder of a sweep lists and that are not finished. Each process receives its share of the cores
(``OMP_NUM_THREADS``) or of the GPUs (``CUDA_VISIBLE_DEVICES``) and writes its output to ``<sweep>/logs/<number>.log``.
A signal is forwarded to the processes, which save a checkpoint; none outlives this process.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from blueberry_video.launch import environment, points, processes, signals
from blueberry_video.launch.errors import OneParagraphErrors
from blueberry_video.launch.sweep_folder import SweepFolder, now

POLL_SECONDS = 0.1
MODULE = "blueberry_video.train"
Environment = dict[str, str]


def slots(jobs: int, config: DictConfig) -> list[Environment]:
    """Returns the environment variables of each of ``jobs`` processes: their shares of the cores or GPUs.

    Args:
        jobs: number of processes at once.
        config: the config of a point.

    Raises:
        ValueError: if there are fewer cores or GPUs than processes.
    """
    trainer = config.trainer
    gpus = _gpus() if trainer.get("accelerator", "auto") in ("gpu", "cuda", "auto") else []
    number, devices = environment.device_count(trainer), trainer.get("devices", 1)
    if gpus:
        share = number or len(gpus) // jobs
        if share * jobs > len(gpus) or not share:
            raise ValueError(
                f"--jobs {jobs} (JOBS={jobs}) with trainer.devices={devices} needs {jobs * (number or 1)} GPUs, and "
                f"there are {len(gpus)}: use at most {len(gpus) // (number or 1)} jobs."
            )
        return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * share : (i + 1) * share])} for i in range(jobs)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if jobs > cores:
        raise ValueError(f"--jobs {jobs} (JOBS={jobs}) is more than the {cores} cores: use at most {cores} jobs.")
    return [{"OMP_NUM_THREADS": str(max(1, cores // (jobs * (number or 1))))}] * jobs


def run(
    folder: Path,
    slots: Sequence[Environment],
    retry: bool = False,
    fail_fast: bool = False,
    code: Mapping[str, str] | None = None,
    foreground: bool = False,
) -> None:
    """Runs the points of a sweep that are not finished, and prints one line for each.

    Args:
        folder: the folder of the sweep, of which each record has the ``command`` of its point.
        slots: environment variables of each process that runs at once.
        retry: also run the points that failed before.
        fail_fast: after a failure, interrupt the other points and start no more.
        code: further environment variables of all processes, which select the code that they run.
        foreground: print the output of the points, in place of writing it to files.

    Raises:
        SystemExit: with code 1, after a failure with ``fail_fast``.
        Interrupted: after a signal.
    """
    waiting = []
    for record in points.read(folder):
        if record["state"] == "finished":
            print(f"point {record['number']} is finished: {record['run']}", flush=True)
        elif record["state"] == "failed" and not retry:
            print(f"point {record['number']} failed before, and is not trained again: {record['error']}", flush=True)
        else:
            waiting.append(record)
    free, running = [*range(len(slots))], dict[int, tuple[int, subprocess.Popen]]()
    failed = False
    try:
        while running or (waiting and not failed):
            while waiting and free and not failed:
                slot, record = free.pop(0), waiting.pop(0)
                variables = {**slots[slot], **(code or {})}
                running[record["number"]] = slot, _start(folder, record, variables, foreground)
            time.sleep(POLL_SECONDS)
            for number, (slot, process) in [*running.items()]:
                if (status := process.poll()) is not None:
                    del running[number]
                    free.append(slot)
                    ended = _end(folder, number, status)
                    if ended == "failed" and fail_fast and not failed:
                        failed = True
                        _interrupt(running, signal.SIGTERM)
    except signals.Interrupted as interrupted:
        _interrupt(running, interrupted.signal)
        raise
    finally:
        processes.end([process for _, process in running.values()])
    if failed:
        raise SystemExit(1)


def _start(folder: Path, record: Mapping[str, Any], own: Environment, foreground: bool) -> subprocess.Popen:
    """Starts the process of a point, in a session without terminal, so that Ctrl-C reaches it once, forwarded."""
    file = points.file_of(folder, record["number"])
    identity = {points.FILE_VARIABLE: str(file), processes.PARENT_VARIABLE: str(os.getpid())}
    variables = {**os.environ, **own, **identity}
    if threads := os.environ.get("OMP_NUM_THREADS"):
        variables["OMP_NUM_THREADS"] = threads
    command = [sys.executable, "-m", MODULE, *record["command"]]
    title = f"point {record['number']} starts: {' '.join(record['overrides'])}"
    if foreground:
        print(title, flush=True)
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=variables, start_new_session=True)
    log = folder / "logs" / f"{record['number']}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    points.update(file, log=str(log))
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=variables, start_new_session=True
        )
    print(f"{title}; log: {log}", flush=True)
    return process


def _interrupt(running: Mapping[int, tuple[int, subprocess.Popen]], number: int) -> None:
    """Sends a signal to the processes, which may have ranks, and waits until they have saved a checkpoint."""
    seconds = signals.seconds_to_save(number) + 2 * processes.WRITE_SECONDS
    processes.end([process for _, process in running.values()], number, seconds)


def _end(folder: Path, number: int, code: int) -> str:
    """Prints how the process of a point ended, records a failure that it could not record, and returns its state."""
    file = points.file_of(folder, number)
    record = json.loads(file.read_text())
    if code and record["state"] in ("pending", "running"):  # killed, or it failed before it trained
        if code in (*points.SIGNALS, -signal.SIGTERM, -signal.SIGINT):
            points.update(file, state="interrupted")
        else:
            points.update(file, state="failed", error=processes.describe(code))
        record = json.loads(file.read_text())
    if record["state"] == "failed":
        log = f" Log: {record['log']}" if record["log"] else ""
        print(f"\nError in point {number}: {record['error'].rstrip('.')}.{log}", file=sys.stderr, flush=True)
    else:
        print(f"point {number}: {record['state']}", flush=True)
    return record["state"]


def _gpus() -> list[str]:
    """Returns the names of the GPUs that this process may use."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch  # slow to import

    return [str(index) for index in range(torch.cuda.device_count())]


def main(arguments: list[str]) -> None:
    """Runs the points of a submission, as many at once as ``sweep.json`` has ``slots``."""
    parser = argparse.ArgumentParser(prog="python -m blueberry_video.launch.pool")
    parser.add_argument("folder", type=Path, help="the folder of a submission")
    folder = SweepFolder(parser.parse_args(arguments).folder)
    if not folder.lock():
        raise BlockingIOError(f"the points of {folder.path} are run by a different process: wait until it ends.")
    with signals.handled():
        run(folder.path, folder.record["slots"])
    folder.update(ended=now())


if __name__ == "__main__":
    with OneParagraphErrors():
        main(sys.argv[1:])
