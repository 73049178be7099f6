"""State of the code in git: commit and changes."""

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from blueberry_video.installation import SNAPSHOT


def git_state(folder: str | Path | None = None) -> dict[str, Any]:
    """Returns ``commit``, ``dirty`` and ``diff_hash`` of a git working tree; all ``None`` outside a repository.

    ``diff_hash`` is the SHA-256 of the diff of tracked files and of the names and contents of untracked files: two
    dirty runs with the same hash ran the same code. It is ``None`` for a clean tree.

    Args:
        folder: a folder of the tree; None: the working directory, or in a submitted job the state of the tree from
            which the snapshot of the code was taken.
    """
    if folder is None and SNAPSHOT.is_file():
        return json.loads(SNAPSHOT.read_text())["git"]
    folder = folder or "."
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
