"""Resources of this machine: memory, cores, disk, wandb key. Does not import torch."""

import netrc
import os
from pathlib import Path

GIB = 2**30
WANDB_HOST = "api.wandb.ai"


def available_memory() -> int | None:
    """Returns the available memory in bytes; None if unknown (not Linux)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def existing_parent(path: Path) -> Path:
    """Returns the path, or its nearest existing parent."""
    path = path.absolute()
    return path if path.exists() else existing_parent(path.parent)


def wandb_key() -> str | None:
    """Returns the source of the Weights & Biases key, an environment variable or the netrc file; None without a key."""
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return str(file) if file.is_file() and netrc.netrc(file).authenticators(WANDB_HOST) else None
