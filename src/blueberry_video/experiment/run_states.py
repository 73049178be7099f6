"""State and last step of a run, read from its files while it runs or after it was killed. Does not import torch."""

import csv
import json
import re
from pathlib import Path
from typing import Any

from blueberry_video.experiment.lock import check_unlocked

TAIL = 4096  # bytes at the end of metrics.csv in which the last step is


def read(run: Path) -> dict[str, Any]:
    """Returns the contents of ``run.json``; empty if it was removed, or is damaged."""
    try:
        return json.loads((run / "run.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}


def state(run: Path, record: dict[str, Any]) -> str:
    """Returns the state of a run: its status, or ``lost`` if it is not running although its record states it."""
    if record.get("status") != "running":
        return record.get("status", "lost")
    try:
        check_unlocked(run)
    except BlockingIOError:
        return "running"
    return "lost"


def steps(run: Path, record: dict[str, Any]) -> str:
    """Returns the last step of a run, of the number in its config."""
    if not record:
        return ""
    step = record.get("step")
    file = run / "metrics.csv"
    if step is None and file.is_file():
        with file.open("rb") as lines:
            header = next(csv.reader([lines.readline().decode()]), [])
            lines.seek(max(lines.tell(), file.stat().st_size - TAIL))
            last = lines.read().decode(errors="replace").splitlines()[-1:]
        values = dict(zip(header, next(csv.reader(last), []), strict=False))
        step = values.get("step")
    config = run / "config.yaml"
    text = config.read_text() if config.is_file() else ""
    found = re.search(r"^trainer:\n(?:[ ].*\n)*?  max_steps: (\d+)", text, re.MULTILINE)
    return f"{step or 0}/{found[1]}" if found else str(step or 0)
