"""Multi-process runs: ``torch.distributed.run`` starts one process per device on the same resolved config.

Lightning would start them by running the whole command again, so that in a sweep every rank would run the whole sweep.
Instead, the process started by the user creates the run folder, starts the ranks, waits, and writes the report.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

FOLDER_VARIABLE = "BLUEBERRY_VIDEO_RUN_FOLDER"


def shared_folder() -> Path | None:
    """Returns the run folder shared by all ranks in a process started by :func:`start`, otherwise None."""
    folder = os.environ.get(FOLDER_VARIABLE)
    return Path(folder) if folder else None


def count(trainer: Mapping[str, Any]) -> int:
    """Returns the number of processes to start on this machine; 1 if they are already started (rank, Slurm task).

    Raises:
        ValueError: if ``devices`` is all GPUs and there are none.
    """
    if shared_folder() or int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return 1
    devices, accelerator = trainer.get("devices", 1), trainer.get("accelerator", "auto")
    if isinstance(devices, list | tuple):
        return len(devices)
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    if devices not in (-1, "-1", "auto"):
        return int(devices)
    if accelerator == "cpu":
        return 1
    import torch  # only here: a fixed number of devices does not need torch

    available = torch.cuda.device_count()
    if available == 0 and accelerator in ("gpu", "cuda"):
        raise ValueError(
            f"trainer.devices={devices} is all GPUs, and PyTorch finds none: use `trainer=cpu`, or several CPU "
            "processes with `trainer=ddp trainer.accelerator=cpu trainer.devices=2`. `make doctor` lists the devices."
        )
    return max(available, 1)


def start(config: DictConfig, run: Path, number: int) -> None:
    """Trains ``config`` in ``number`` processes that share the folder ``run``, and waits for them.

    Raises:
        RuntimeError: if a process fails; its error is printed before.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(OmegaConf.to_yaml(config))
        file.flush()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
        command += ["-m", "blueberry_video.train", file.name]
        environment = {
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // number)),
            **os.environ,
            FOLDER_VARIABLE: str(run),
        }
        code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        raise RuntimeError(
            f"one of the {number} processes of the run {run} failed with exit code {code}: its error is printed above. "
            "For shorter error output, use one process: `trainer.devices=1`."
        )
