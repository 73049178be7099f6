"""Files of prompts, a clip per line: text, or JSONL with settings of each clip."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

KEYS: dict[str, type | tuple[type, ...]] = {
    "prompt": str,
    "negative": str,
    "seed": int,
    "frames": int,
    "strength": (int, float),
    "image": str,
    "video": str,
    "labels": dict,
    "actions": list,
}


def read_prompts(file: str | Path) -> list[dict[str, Any]]:
    """Reads the settings of clips from a file.

    Args:
        file: ``.txt`` with a caption per line, where empty lines and lines that begin with # are ignored; or ``.jsonl``
            with an object per line, of the keys ``prompt``, ``negative``, ``seed``, ``frames``, ``strength``,
            ``image``, ``video``, ``labels`` and ``actions``. Paths are relative to the folder of the file.

    Returns:
        A dict of the given keys for each clip.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no clips, a different ending, or a line that is not valid; the message names it.
    """
    path = Path(file)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"--prompts={file} must end in .txt, a caption per line, or .jsonl, an object per line.")
    if not path.is_file():
        raise FileNotFoundError(f"--prompts={file} does not exist: use a .txt file with a caption per line, or .jsonl.")
    lines = list(enumerate(path.read_text(encoding="utf-8").splitlines(), start=1))
    found = list(_captions(lines) if path.suffix == ".txt" else _objects(lines, path))
    if not found:
        raise ValueError(f"--prompts={file} has no captions: write one per line.")
    return found


def _captions(lines: Iterable[tuple[int, str]]) -> Iterable[dict[str, Any]]:
    captions = (line.strip() for _, line in lines)
    return [{"prompt": caption} for caption in captions if caption and not caption.startswith("#")]


def _objects(lines: Iterable[tuple[int, str]], path: Path) -> Iterable[dict[str, Any]]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}.") from error
        if not isinstance(row, dict):
            raise ValueError(f'{path}, line {number} must be an object, such as {{"prompt": "a red disc"}}.')
        for key, value in row.items():
            if key not in KEYS:
                raise ValueError(f"{path}, line {number}: {key}={value!r} is unknown: use {', '.join(KEYS)}.")
            if not isinstance(value, KEYS[key]) or isinstance(value, bool):
                kind = KEYS[key]
                name = kind.__name__ if isinstance(kind, type) else "number"
                raise ValueError(f"{path}, line {number}: {key}={value!r} must be of type {name}.")
        yield {key: str(path.parent / value) if key in ("image", "video") else value for key, value in row.items()}
