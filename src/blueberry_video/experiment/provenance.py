"""Provenance of a run: git commit, package versions, hardware."""

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "blueberry-video",
    "torch",
    "lightning",
    "hydra-core",
    "wandb",
    "einops",
    "torchmetrics",
    "torchcodec",
    "av",
    "numpy",
)


def git_state(folder: str | Path = ".") -> dict[str, Any]:
    """Returns ``commit``, ``dirty`` and ``diff_hash`` of a git working tree; all ``None`` outside a repository.

    ``diff_hash`` is the SHA-256 of the diff of tracked files and of the names and contents of untracked files: two
    dirty runs with the same hash ran the same code. It is ``None`` for a clean tree.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    top = _git(folder, "rev-parse", "--show-toplevel")
    if commit is None or top is None:
        return {"commit": None, "dirty": None, "diff_hash": None}
    root = Path(top.decode().strip())
    changes = _git(root, "diff", "HEAD", "--binary") or b""
    untracked = (_git(root, "ls-files", "--others", "--exclude-standard", "-z") or b"").split(b"\0")
    digest = hashlib.sha256(changes)
    names = sorted(name for name in untracked if name)
    for name in names:
        file = root / os.fsdecode(name)
        digest.update(name + b"\0" + (file.read_bytes() if file.is_file() else b""))
    dirty = bool(changes or names)
    return {"commit": commit.decode().strip(), "dirty": dirty, "diff_hash": digest.hexdigest() if dirty else None}


def _git(folder: str | Path, *arguments: str) -> bytes | None:
    """Returns the output of a git command, or ``None`` if git is missing or the command fails."""
    try:
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout if result.returncode == 0 else None


def versions() -> dict[str, str | None]:
    """Returns the versions of Python, CUDA and the packages that affect results; ``None`` if not installed."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def hardware() -> dict[str, Any]:
    """Returns CPU model, number of usable cores, memory in GiB, GPU names, system and host name."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": platform.platform(),
        "host": platform.node(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
