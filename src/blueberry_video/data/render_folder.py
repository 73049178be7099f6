"""Folder of the output of a rendering command, with a record of its settings."""

import json
from pathlib import Path
from typing import Any

from blueberry_video.atomic import explained_errors, write_text

RECORD = "render.json"


def open_render_folder(folder: str | Path, settings: dict[str, Any]) -> Path:
    """Creates a folder, or opens one that a call with the same settings has left, complete or not.

    Files appear in it when they are complete, so that a repeated command writes the missing ones.

    Args:
        settings: everything that the files depend on, JSON values; stored in ``render.json`` and compared.

    Raises:
        FileExistsError: for a folder with other content, or of other settings.
    """
    folder = Path(folder)
    record = folder / RECORD
    temporary = f".{RECORD}.tmp"  # may be left by a kill
    settings = json.loads(json.dumps(settings))
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"out={folder} is a file: choose the name of a folder.")
    if record.is_file():
        found = json.loads(record.read_text())
        changed = [f"{key} was {found.get(key)} and is {now}" for key, now in settings.items() if found.get(key) != now]
        if changed:
            raise FileExistsError(
                f"out={folder} holds another rendering: {'; '.join(changed)}. Choose another folder, or remove it."
            )
        return folder
    if folder.is_dir() and any(path.name != temporary for path in folder.iterdir()):
        raise FileExistsError(
            f"out={folder} exists and has no {RECORD} of this command: choose another folder; nothing was changed."
        )
    with explained_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps(settings, indent=1) + "\n")
    return folder
