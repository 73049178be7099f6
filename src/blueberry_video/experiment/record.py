"""Reading and writing of ``run.json``."""

import errno
import json
import math
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from blueberry_video.atomic import write_text


def read_record(run: Path) -> dict[str, Any]:
    """Returns the contents of the ``run.json`` of a run folder.

    Raises:
        ValueError: if the file is damaged.
    """
    file = run / "run.json"
    try:
        record = json.loads(file.read_text())
        if missing := [key for key in ("status", "started", "metrics") if key not in record]:
            raise ValueError(f"it has no {missing[0]}")
    except (ValueError, TypeError) as error:  # ValueError: also of JSON and UTF-8
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is damaged: {error}. Restore it from a backup, or start a new run "
            f"from the weights with init_from={run}."
        ) from error
    return record


@rank_zero_only
def write_record(run: Path, record: dict[str, Any]) -> None:
    """Writes ``run.json`` atomically; on a full disk in place, if the new content fits into the blocks of the file."""
    file = run / "run.json"
    text = json.dumps(_with_null(record), indent=2, allow_nan=False) + "\n"
    try:
        write_text(file, text)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not file.is_file():
            raise
        data = text.encode()
        if len(data) > file.stat().st_blocks * 512:
            raise
        with file.open("r+b", buffering=0) as open_file:
            open_file.write(data)
            open_file.truncate()


def _with_null(value: Any) -> Any:
    """Replaces non-finite numbers, which JSON cannot represent, with ``None``."""
    if isinstance(value, dict):
        return {key: _with_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
