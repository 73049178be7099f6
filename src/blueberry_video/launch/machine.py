"""What this machine has: memory, disk, a wandb key. Nothing here imports torch."""

import netrc
import os
from pathlib import Path

WANDB_HOST = "api.wandb.ai"


def available_memory() -> int | None:
    """Bytes that programs can still take; None where the system does not tell (it is not Linux)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def existing_parent(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return path if path.exists() else existing_parent(path.parent)


def wandb_key() -> str | None:
    """Where a Weights & Biases key was found: the environment variable or the netrc file; None where there is none."""
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return str(file) if file.is_file() and netrc.netrc(file).authenticators(WANDB_HOST) else None
