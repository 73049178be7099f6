"""Resources of this machine: memory, cores, disk, wandb key. Does not import torch."""

import netrc
import os
from pathlib import Path

GIB = 2**30
WANDB_HOST = "api.wandb.ai"
WANDB_MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
"""Values of WANDB_MODE, two of them obsolete -> mode of a run."""


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


def wandb_mode(mode: str, has_key: bool) -> str | None:
    """Returns ``online``, ``offline`` or ``disabled``; None if ``WANDB_MODE`` has an invalid value.

    Args:
        mode: ``logger.mode``; for ``auto``, WANDB_MODE or WANDB_DISABLED if set, otherwise online if there is a key.
        has_key: True if there is a key for the server.
    """
    value = os.environ.get("WANDB_MODE", "").strip()
    if value and value not in WANDB_MODES:
        return None
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in ("1", "true", "yes", "on"):
        return "disabled"
    return WANDB_MODES[value] if value else "online" if has_key else "offline"


def resident_memory() -> int:
    """Returns the resident memory of this process in bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
