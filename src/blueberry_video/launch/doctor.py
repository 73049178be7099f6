"""``make doctor``: versions, devices and tools of this machine, and what to do about each that is missing."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from blueberry_video.launch.machine import available_memory, existing_parent, wandb_key

GIB = 2**30
PACKAGES = (
    "torch",
    "lightning",
    "hydra-core",
    "wandb",
    "einops",
    "torchmetrics",
    "av",
    "torchcodec",
    "numpy",
    "matplotlib",
)
EXTRAS = {
    "pretrained": "diffusers",
    "cuda": "triton",
    "cluster": "hydra_plugins.hydra_submitit_launcher",
    "streaming": "litdata",
}


def main() -> int:
    """Prints one line a fact; returns 1 where something is missing that every run needs."""
    missing = _versions()
    _devices()
    _video()
    _services()
    return 1 if missing else 0


def _line(ok: bool | None, what: str, said: str, fix: str = "") -> None:
    mark = {True: "ok  ", False: "LACK", None: "-   "}[ok]
    print(f"  {mark}  {what:<12} {said}{f'. {fix}' if fix else ''}")


def _versions() -> list[str]:
    print("versions")
    _line(sys.version_info >= (3, 11), "python", f"{platform.python_version()}, {sys.executable}")
    installed = {package.metadata["Name"].lower(): package.version for package in metadata.distributions()}
    tested = _tested_versions()
    missing = []
    for name in PACKAGES:
        version, wanted = installed.get(name), tested.get(name)
        if version is None:
            missing.append(name)
            _line(False, name, "not installed", "Run `make setup`.")
        elif wanted and version.partition("+")[0] != wanted:
            _line(
                False, name, version, f"Tested with {wanted}: `make setup` restores it, or try on and run `make test`."
            )
        else:
            _line(True, name, version)
    for extra, module in EXTRAS.items():
        found = importlib.util.find_spec(module.partition(".")[0]) is not None and _has(module)
        _line(
            True if found else None,
            f"[{extra}]",
            "installed" if found else f"optional, not installed: .venv/bin/pip install -e '.[{extra}]'",
        )
    return missing


def _has(module: str) -> bool:
    parent, _, _ = module.rpartition(".")
    return (not parent or importlib.util.find_spec(parent) is not None) and importlib.util.find_spec(module) is not None


def _tested_versions() -> dict[str, str]:
    """What constraints.txt pins, where this runs in a checkout."""
    file = Path(__file__).resolve().parents[3] / "constraints.txt"
    lines = file.read_text().splitlines() if file.is_file() else []
    return {name.lower(): version for name, _, version in (line.partition("==") for line in lines) if version}


def _devices() -> None:
    print("devices")
    free = available_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    _line(True, "cpu", f"{cores} cores" + (f", {free / GIB:.1f} GiB of memory free" if free is not None else ""))
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        _line(True, f"gpu {index}", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB: `trainer=gpu`")
    if not torch.cuda.device_count():
        driver, built = shutil.which("nvidia-smi"), torch.version.cuda
        if driver and not built:
            _line(
                False,
                "gpu",
                "there is a driver, but this PyTorch is a CPU build",
                "Install the CUDA build of the pinned version: pytorch.org/get-started.",
            )
        elif driver:
            _line(
                False,
                "gpu",
                "PyTorch sees none",
                "Compare `nvidia-smi`'s CUDA version with " + f"torch's {built}; update the driver.",
            )
        else:
            _line(None, "gpu", "none: everything runs on the CPU (trainer=cpu, the default)")
    usage = shutil.disk_usage(existing_parent(Path("outputs")))
    few = usage.free < 5 * GIB
    _line(
        not few,
        "disk",
        f"{usage.free / GIB:.1f} GiB free here",
        "Free some, or write elsewhere with `output_dir=…`." if few else "",
    )


def _video() -> None:
    print("video")
    ffmpeg = shutil.which("ffmpeg")
    _line(
        True if ffmpeg else None,
        "ffmpeg",
        ffmpeg or "none: PyAV brings its own and is used. For the faster torchcodec: apt-get install ffmpeg",
    )
    for name in ("av", "torchcodec"):
        # in a process of its own: a decoder that does not fit the system's libraries may take the whole process down
        result = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, check=False)
        if result.returncode == 0:
            _line(True, name, "loads")
        elif name == "torchcodec" and not ffmpeg:
            _line(None, name, "does not load without FFmpeg; PyAV decodes instead")
        else:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1][:80]
            _line(
                False,
                name,
                f"does not load ({last})",
                "`make setup` installs the tested version; torchcodec also needs a system FFmpeg of version 4 to 8.",
            )


def _services() -> None:
    print("services")
    key = wandb_key()
    wandb = Path(sysconfig.get_path("scripts")) / "wandb"
    _line(
        True if key else None,
        "wandb",
        f"key in {key}: runs go online"
        if key
        else f"no key: runs stay offline. `{wandb} login` to go online, `{wandb} leet <run>` to look without",
    )
    slurm = shutil.which("sbatch")
    _line(True if slurm else None, "slurm", slurm or "none: sweeps run here, one after the other")
    git = shutil.which("git")
    _line(bool(git), "git", git or "none", "" if git else "Install it: run.json records the commit of each run.")


if __name__ == "__main__":
    sys.exit(main())
