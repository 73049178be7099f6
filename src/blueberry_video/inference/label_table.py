"""Table of predicted labels, as CSV or JSONL, that a killed command continues.

A row of JSONL is a window of a video, with the keys ``video``, ``start`` and ``end`` in seconds, ``missing``, the
number of frames that do not decode, and ``labels``, {label: {class: probability}}; or it has ``video`` and ``error``.
CSV has the columns video, start, end, label, class, probability, error, and a row per class. The settings are in
``<file>.json``.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from blueberry_video.atomic import explained_errors, write_text

COLUMNS = ("video", "start", "end", "label", "class", "probability", "error")


class Window(NamedTuple):
    """Labels of a part of a video: seconds, frames that could not be decoded, label -> class -> probability."""

    start: float
    end: float
    missing: int
    labels: Mapping[str, Mapping[str, float]]


class LabelTable:
    """Writer of a table, as a context manager.

    Args:
        file: ends in ``.csv`` or ``.jsonl``. A file that a killed command has left is continued: its last video is
            written again, because its rows may be incomplete.
        settings: JSON values that the rows depend on.
        top: most probable classes per label; ``None`` for all.
        overwrite: replace a file.

    Attributes:
        done: videos with complete rows.

    Raises:
        ValueError: another ending.
        FileExistsError: the file has rows of other settings.
    """

    def __init__(self, file: str | Path, settings: Mapping[str, Any], top: int | None = None, overwrite: bool = False):
        self.file, self.top = Path(file), top
        if self.file.suffix not in (".csv", ".jsonl"):
            raise ValueError(f"OUT={file} must end in .csv or .jsonl, the formats that are written.")
        self._settings = {**settings, "top": top}
        self._about = self.file.with_name(f"{self.file.name}.json")
        if not overwrite and self.file.exists():
            self._check()
        self.done: set[str] = set()
        self._kept = "" if overwrite or not self.file.exists() else self._complete(self.file.read_text())

    def __enter__(self) -> Self:
        with explained_errors(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._about, json.dumps(self._settings, indent=2) + "\n")
            write_text(self.file, self._kept or ("" if self._is_json else _line(COLUMNS)))
            self._open = self.file.open("a", newline="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def add(self, video: str, windows: Sequence[Window]) -> None:
        """Appends the rows of a video."""
        rows: list[Any] = []
        for window in windows:
            labels = {label: dict(list(classes.items())[: self.top]) for label, classes in window.labels.items()}
            if self._is_json:
                rows.append({"video": video, **window._asdict(), "labels": labels})
                continue
            place = (video, f"{window.start:.3f}", f"{window.end:.3f}")
            rows += [
                (
                    *place,
                    label,
                    name,
                    f"{value:.6g}",
                    f"{window.missing} frames do not decode" if window.missing else "",
                )
                for label, classes in labels.items()
                for name, value in classes.items()
            ]
        self._append(rows)

    def fail(self, video: str, reason: str) -> None:
        """Appends a row with the reason why a video has no labels."""
        self._append([{"video": video, "error": reason} if self._is_json else (video, "", "", "", "", "", reason)])

    @property
    def _is_json(self) -> bool:
        return self.file.suffix == ".jsonl"

    def _append(self, rows: Sequence[Any]) -> None:
        with explained_errors(self.file):
            self._open.write("".join(json.dumps(row) + "\n" if self._is_json else _line(row) for row in rows))
            self._open.flush()

    def _check(self) -> None:
        try:
            settings = json.loads(self._about.read_text())
        except (OSError, ValueError):
            settings = {}
        if differing := sorted(key for key, value in self._settings.items() if settings.get(key) != value):
            key = differing[0]
            raise FileExistsError(
                f"OUT={self.file} exists, and was written with {key}={settings.get(key)} instead of "
                f"{self._settings[key]}: choose another file, or pass --overwrite to replace it."
            )

    def _complete(self, text: str) -> str:
        """Returns the rows of all videos but the last, and sets ``done``."""
        lines = text.splitlines(keepends=True)
        if self._is_json:
            whole = [line for line in lines if line.endswith("\n")]
            rows, videos = whole, [json.loads(line)["video"] for line in whole]
            header = ""
        else:
            parsed = list(csv.reader(io.StringIO(text, newline="")))[1:]
            if parsed and (not text.endswith("\n") or len(parsed[-1]) < len(COLUMNS)):
                parsed.pop()  # cut off by a kill
            header, videos = _line(COLUMNS), [row[0] for row in parsed]
            rows = [_line(row) for row in parsed]
        kept = [(row, video) for row, video in zip(rows, videos, strict=True) if video != videos[-1]]
        self.done = {video for _, video in kept}
        return header + "".join(row for row, _ in kept)


def _line(row: Sequence[str]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(row)
    return text.getvalue()
