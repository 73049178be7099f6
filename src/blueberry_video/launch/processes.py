"""One run in several processes: ``torch.distributed.run`` starts one a device, all on the same resolved config.

Lightning would start them by running the whole command again, and in a sweep every rank would then sweep by itself.
So the process that the user started makes the run folder, starts the ranks, waits, and alone writes the report.
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
    """In a process that ``start`` started: the run folder that all ranks share. Else None."""
    folder = os.environ.get(FOLDER_VARIABLE)
    return Path(folder) if folder else None


def count(trainer: Mapping[str, Any]) -> int:
    """How many processes a trainer's config asks for on this machine; 1 where a cluster has already started them.

    Raises:
        ValueError: it asks for devices that are not there.
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
    import torch  # only here: a config with a number of devices is judged without it

    available = torch.cuda.device_count()
    if available == 0 and accelerator in ("gpu", "cuda"):
        raise ValueError(
            f"`trainer.devices` = {devices} asks for every GPU, and PyTorch sees none: use `trainer=cpu`, or several "
            "CPU processes with `trainer=ddp trainer.accelerator=cpu trainer.devices=2`. `make doctor` says more."
        )
    return max(available, 1)


def start(config: DictConfig, run: Path, number: int) -> None:
    """Trains ``config`` in ``number`` processes that share the folder ``run``, and waits.

    Raises:
        RuntimeError: a process failed; its own message was printed.
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
            f"one of the {number} processes of the run {run} ended with exit code {code}: its error is printed above. "
            "`trainer.devices=1` runs the same config in one process, where errors are easier to read."
        )
