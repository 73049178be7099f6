"""``blueberry doctor``: lists versions, devices and tools of this machine, with a fix for each problem."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from blueberry_video.installation import IN_CLONE, install_command, shipped
from blueberry_video.launch.machine import GIB, available_memory, existing_parent, wandb_key

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
OPTIONAL = {
    "pretrained": "diffusers",
    "cuda": "triton",
    "cluster": "hydra_plugins.hydra_submitit_launcher",
    "onnx": "onnxscript",
    "exr": "OpenEXR",
}


def main() -> int:
    """Prints one line per fact; returns 1 if a required package is missing."""
    missing = _versions()
    _devices()
    _video()
    _services()
    return 1 if missing else 0


def _line(ok: bool | None, what: str, text: str, fix: str = "") -> None:
    """Prints a line; ``ok=None`` is for something optional that is missing."""
    mark = {True: "ok  ", False: "FAIL", None: "-   "}[ok]
    print(f"  {mark}  {what:<12} {text}{f'. {fix}' if fix else ''}")


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
            _line(False, name, "not installed", f"Run `{_setup(name)}`.")
        elif wanted and version.partition("+")[0] != wanted:
            _line(False, name, version, f"Tested with {wanted}: `{_setup(f'{name}=={wanted}')}` installs it.")
        else:
            _line(True, name, version)
    for extra, module in OPTIONAL.items():
        found = importlib.util.find_spec(module.partition(".")[0]) is not None and _has(module)
        _line(
            True if found else None,
            f"[{extra}]",
            "installed" if found else f"optional, not installed: {install_command(extra)}",
        )
    return missing


def _has(module: str) -> bool:
    parent, _, _ = module.rpartition(".")
    return (not parent or importlib.util.find_spec(parent) is not None) and importlib.util.find_spec(module) is not None


def _tested_versions() -> dict[str, str]:
    """Returns the versions pinned in constraints.txt."""
    lines = shipped("constraints.txt").read_text().splitlines()
    return {name.lower(): version for name, _, version in (line.partition("==") for line in lines) if version}


def _setup(requirement: str) -> str:
    """Returns the command that installs a package of the tested versions."""
    return "make setup" if IN_CLONE else f"pip install '{requirement}' -c {shipped('constraints.txt')}"


def _devices() -> None:
    print("devices")
    free = available_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    _line(True, "cpu", f"{cores} cores" + (f", {free / GIB:.1f} GiB of memory available" if free is not None else ""))
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
                "there is a driver, but PyTorch is a CPU build",
                "Install the CUDA build of the pinned version: pytorch.org/get-started.",
            )
        elif driver:
            _line(
                False,
                "gpu",
                "PyTorch finds none",
                f"PyTorch needs CUDA {built}: compare with the version in `nvidia-smi`, and update the driver.",
            )
        else:
            _line(None, "gpu", "none: runs use the CPU (trainer=cpu, the default)")
    usage = shutil.disk_usage(existing_parent(Path("outputs")))
    low = usage.free < 5 * GIB
    _line(
        not low,
        "disk",
        f"{usage.free / GIB:.1f} GiB free here",
        "Free some space, or use another disk: `output_dir=…`." if low else "",
    )


def _video() -> None:
    print("video")
    ffmpeg = shutil.which("ffmpeg")
    _line(
        True if ffmpeg else None,
        "ffmpeg",
        ffmpeg or "none: PyAV is used, which includes FFmpeg. For torchcodec, which is faster: apt-get install ffmpeg",
    )
    for name in ("av", "torchcodec"):
        # in a separate process: a decoder that is incompatible with the system's libraries may crash it
        result = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, check=False)
        if result.returncode == 0:
            _line(True, name, "loads")
        elif name == "torchcodec" and not ffmpeg:
            _line(None, name, "does not load without FFmpeg; PyAV decodes instead")
        else:
            _line(False, name, *_load_failure(name, result.stderr))


def _load_failure(name: str, traceback: str) -> tuple[str, str]:
    """Returns reason and fix for a decoder that fails to import."""
    # torchcodec tries one library per version of FFmpeg: the reason of the installed version is not the last line
    if python := re.search(r"(libpython[\d.]+\.so[\d.]*): cannot open shared object", traceback):
        return (
            f"does not load: {python[1]} is missing, the shared library of Python",
            "`apt-get install libpython3-dev` installs it; until then PyAV decodes.",
        )
    last = (traceback.strip().splitlines() or ["no message"])[-1][:80]
    return (
        f"does not load ({last})",
        f"`{_setup(name)}` installs the tested version; torchcodec also needs a system FFmpeg of version 4 to 8.",
    )


def _services() -> None:
    print("services")
    key = wandb_key()
    wandb = Path(sysconfig.get_path("scripts")) / "wandb"
    _line(
        True if key else None,
        "wandb",
        f"key in {key}: runs are logged online"
        if key
        else f"no key: runs are logged offline. `{wandb} login` sets one, `{wandb} leet <run>` shows offline runs",
    )
    slurm = shutil.which("sbatch")
    _line(True if slurm else None, "slurm", slurm or "none: sweeps run locally, one job after the other")
    git = shutil.which("git")
    _line(bool(git), "git", git or "none", "" if git else "Install git: run.json records the commit of each run.")


if __name__ == "__main__":
    sys.exit(main())
