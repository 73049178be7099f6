"""Multi-process runs: one process (rank) per device on the same resolved config, started and watched by this process.

Lightning would start them by running the whole command again, so that in a sweep every rank would run the whole sweep.
Instead, the process started by the user creates the run folder, starts the ranks, waits, and writes the report. It
hosts the store of ``torch.distributed`` as ``torchrun`` does. No rank outlives it:

- signals are forwarded to the ranks, which have ``signals.seconds_to_save`` to save a checkpoint;
- the kernel kills the ranks if this process is killed;
- if a rank fails, the others are ended, and the error of the rank that failed first is raised;
- a rank that is stopped (SIGSTOP) for ``STOPPED_SECONDS`` ends the run.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from blueberry_video.atomic import write_text
from blueberry_video.installation import start_command
from blueberry_video.launch import environment, signals
from blueberry_video.launch.environment import FOLDER_VARIABLE
from blueberry_video.launch.failures import LOST_PEER, Failure, is_stopped
from blueberry_video.launch.signals import Interrupted

PARENT_VARIABLE = "BLUEBERRY_VIDEO_PARENT"
ERROR_VARIABLE = "BLUEBERRY_VIDEO_ERROR_FILE"

POLL_SECONDS = 0.1
SETTLE_SECONDS = 5.0  # after the first failure, for the other ranks to report their errors
GRACE_SECONDS = 15.0  # between SIGTERM and SIGKILL after a failure
WRITE_SECONDS = 20.0  # to write a checkpoint: the same after a signal, in addition to signals.seconds_to_save
STOPPED_NOTICE_SECONDS = 2.0
STOPPED_SECONDS = 30.0
PR_SET_PDEATHSIG = 1


def shared_folder() -> Path | None:
    """Returns the run folder shared by all ranks in a process started by :func:`start`, otherwise None."""
    folder = os.environ.get(FOLDER_VARIABLE)
    return Path(folder) if folder else None


def count(trainer: Mapping[str, Any]) -> int:
    """Returns the number of processes to start on this machine; 1 if they are already started (rank, Slurm task).

    Raises:
        ValueError: if ``devices`` is all GPUs and there are none.
    """
    if environment.recognize().launcher != "standalone":
        return 1
    if (devices := environment.device_count(trainer)) is not None:
        return devices
    accelerator = trainer.get("accelerator", "auto")
    if accelerator == "cpu":
        return 1
    import torch  # only here: a fixed number of devices does not need torch

    available = torch.cuda.device_count()
    if available == 0 and accelerator in ("gpu", "cuda"):
        raise ValueError(
            f"trainer.devices={trainer.get('devices')} is all GPUs, and PyTorch finds none: use `trainer=cpu`, or "
            "several CPU processes with `trainer=ddp trainer.accelerator=cpu trainer.devices=2`. "
            f"`{start_command('doctor')}` lists the devices."
        )
    return max(available, 1)


def start(config: DictConfig, run: Path, number: int) -> None:
    """Trains ``config`` in ``number`` processes that share the folder ``run``, and waits for them.

    Raises:
        RuntimeError: if a rank fails or stays stopped; names the rank and the error that came first.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // number)),
        **os.environ,
        FOLDER_VARIABLE: str(run),
        PARENT_VARIABLE: str(os.getpid()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "none",  # Lightning and torch.distributed read these as if torchrun had set them
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    with tempfile.TemporaryDirectory(prefix="blueberry-ranks-") as temporary:
        file = Path(temporary) / "config.yaml"
        file.write_text(OmegaConf.to_yaml(config))
        errors = [Path(temporary) / f"error-{rank}.json" for rank in range(number)]
        command = [sys.executable, "-m", "blueberry_video.train", str(file)]
        ranks: list[subprocess.Popen] = []
        try:
            for rank, error in enumerate(errors):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), ERROR_VARIABLE: str(error)}
                ranks.append(subprocess.Popen(command, env=shared | own))
            failure = _wait(ranks, errors)
        except Interrupted as interrupted:
            end(ranks, interrupted.signal, signals.seconds_to_save(interrupted.signal) + WRITE_SECONDS)
            raise
        finally:
            end(ranks)
    if failure is None:
        return
    if failure.text:
        print(failure.text, file=sys.stderr, flush=True)
    raise RuntimeError(
        f"rank {failure.rank} of the {number} processes of the run {run} failed first: {failure.error} "
        "For shorter error output, use one process: `trainer.devices=1`."
    )


def end_with_parent() -> None:
    """In a rank, makes the kernel kill this process when its parent ends; elsewhere does nothing."""
    if not (parent := int(os.environ.get(PARENT_VARIABLE, "0"))):
        return
    try:
        set_by_kernel = ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) == 0
    except (OSError, AttributeError):  # not Linux
        set_by_kernel = False

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    if not set_by_kernel:
        threading.Thread(target=watch, daemon=True).start()
    elif os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def reported() -> Iterator[None]:
    """In a rank, writes an error for its parent, which prints the one that came first; elsewhere does nothing.

    Raises:
        SystemExit: in place of the error.
    """
    file = os.environ.get(ERROR_VARIABLE)
    try:
        yield
    except Exception as error:
        if not file:
            raise
        failure = Failure.of(error, int(os.environ.get("RANK", "0")))
        write_text(Path(file), json.dumps({"time": failure.time, "error": failure.error, "text": failure.text}))
        raise SystemExit(1) from None


@contextmanager
def rank_of(run: Any) -> Iterator[None]:
    """Context manager of a run folder in a rank: closes its loggers; the parent records how the run ended."""
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        run.close(succeeded)


def _wait(ranks: Sequence[subprocess.Popen], errors: Sequence[Path]) -> Failure | None:
    """Waits until all ranks end; returns the first failure, None if there is none."""
    stopped = [0.0] * len(ranks)
    while True:
        codes = [rank.poll() for rank in ranks]
        if any(codes):  # neither None nor 0
            break
        if all(code == 0 for code in codes):
            return None
        time.sleep(POLL_SECONDS)
        for index, rank in enumerate(ranks):
            # counted in polls: this process may have been stopped too, as by Ctrl-Z
            before, stopped[index] = stopped[index], stopped[index] + POLL_SECONDS if is_stopped(rank.pid) else 0.0
            where = f"rank {index} (process {rank.pid}) is stopped by a signal"
            if before < STOPPED_NOTICE_SECONDS <= stopped[index]:
                fix = f"`kill -CONT {rank.pid}` continues it, otherwise the run ends in {STOPPED_SECONDS:.0f} s."
                print(f"{where}: {fix}", file=sys.stderr, flush=True)
            if stopped[index] >= STOPPED_SECONDS:
                return Failure(index, time.time(), f"{where} for {STOPPED_SECONDS:.0f} s, and the others wait for it.")
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(POLL_SECONDS)
    return _first_failure([rank.poll() for rank in ranks], codes, errors)


def _first_failure(
    codes: Sequence[int | None], first_codes: Sequence[int | None], errors: Sequence[Path]
) -> Failure | None:
    """Returns the failure that caused the others.

    Args:
        codes: exit codes of the ranks, None while they run.
        first_codes: those at the time of the first failure.
        errors: their files of :func:`reported`, which may be missing.
    """
    causes, without_report, consequences = list[Failure](), list[Failure](), list[Failure]()
    for rank, (code, first_code, file) in enumerate(zip(codes, first_codes, errors, strict=True)):
        if file.is_file():
            failure = Failure(rank, **json.loads(file.read_text()))
            (consequences if LOST_PEER.search(failure.error) else causes).append(failure)
        elif code:
            without_report.append(Failure(rank, 0.0 if first_code else 1.0, describe(code)))
    for failures in (causes, without_report, consequences):
        if failures:
            return min(failures, key=lambda failure: failure.time)
    return None


def describe(code: int) -> str:
    """Describes an exit code without an error."""
    number = -code if code < 0 else code - 128
    if number not in signal.valid_signals():
        return f"it ended with exit code {code}."
    hint = " If memory was short, lower `data.batch_size`." if number == signal.SIGKILL else ""
    return f"it was ended by {signal.Signals(number).name}.{hint}"


def end(ranks: Sequence[subprocess.Popen], number: int = signal.SIGTERM, seconds: float | None = None) -> None:
    """Sends a signal to the running ranks, and SIGKILL to those that run ``seconds`` later (``GRACE_SECONDS``)."""
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)
            if is_stopped(rank.pid):
                rank.kill()
    deadline = time.monotonic() + (GRACE_SECONDS if seconds is None else seconds)
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
