"""``metrics.csv``: one row per step with all its metrics, steps strictly increasing, readable after a kill."""

import csv
import io
import math
import warnings
from collections.abc import Mapping
from pathlib import Path

from blueberry_video.atomic import explained_errors, write_bytes


class MetricsTable:
    """Writer of a ``metrics.csv`` that appends to an existing file.

    The newest row is rewritten in place when more metrics of its step arrive. A new metric becomes a column, for which
    the whole file is rewritten atomically. An incomplete last line, left by a kill, is dropped.

    Args:
        path: the file; created by the first :meth:`write`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.columns = ["step"]
        self._row: dict[str, str] = {}
        self._row_offset = 0
        if self.path.is_file():
            self._rewrite(_read_rows(self.path))

    @property
    def last_step(self) -> int:
        """The step of the newest row; -1 if there is none."""
        return int(self._row["step"]) if self._row else -1

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        """Adds metrics to the row of ``step``, which must be the newest or a later step.

        Raises:
            ValueError: if ``step`` is before the newest row.
        """
        if step < self.last_step:
            raise ValueError(
                f"step={step} of the metrics {', '.join(metrics)} is before step {self.last_step}, the last one in "
                f"{self.path}: log with trainer.global_step."
            )
        texts = {name: _text(value) for name, value in metrics.items() if name != "step"}
        if step > self.last_step:
            self._row_offset += len(self._line()) if self._row else 0
            self._row = {"step": str(step)}
        self._row |= texts
        new_columns = [name for name in texts if name not in self.columns]
        if new_columns or not self.path.is_file():
            rows = _read_rows(self.path) if self.path.is_file() else []
            rows = [row for row in rows if row["step"] != str(step)]
            self.columns += new_columns
            self._rewrite([*rows, self._row])
        else:
            line = self._line()
            with explained_errors(self.path, len(line)), self.path.open("r+b") as file:
                file.seek(self._row_offset)
                file.write(line)
                file.truncate()

    def drop_after(self, step: int) -> None:
        """Removes the rows of later steps."""
        if self.last_step > step:
            self._rewrite([row for row in _read_rows(self.path) if int(row["step"]) <= step])

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        for row in rows:
            self.columns += [name for name in row if name not in self.columns]
        lines = [_line(self.columns), *(_line([row.get(name, "") for name in self.columns]) for row in rows)]
        write_bytes(self.path, b"".join(lines))
        self._row = dict(rows[-1]) if rows else {}
        self._row_offset = sum(map(len, lines)) - (len(lines[-1]) if rows else 0)

    def _line(self) -> bytes:
        return _line([self._row.get(name, "") for name in self.columns])


def read_steps(path: str | Path) -> dict[int, dict[str, float]]:
    """Reads the rows of a ``metrics.csv``: step -> metric -> value, steps increasing; empty without a file."""
    rows = _read_rows(Path(path)) if Path(path).is_file() else []
    return {
        int(row["step"]): {name: float(text) for name, text in row.items() if name != "step" and text} for row in rows
    }


def read_curves(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Reads the columns of a ``metrics.csv``: metric -> [(step, value)], steps increasing; empty without a file."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, values in read_steps(path).items():
        for name, value in values.items():
            curves.setdefault(name, []).append((step, value))
    return curves


def _read_rows(path: Path) -> list[dict[str, str]]:
    """Returns the complete rows; a last line without a newline is incomplete and dropped.

    Damaged rows (NUL bytes, text, steps that do not increase) are dropped with a warning.
    """
    text = path.read_bytes().decode(errors="replace")
    lines = [line for line in text[: text.rfind("\n") + 1].split("\n") if line]
    columns = next(csv.reader(lines[:1]), [])
    if lines and (columns[0] != "step" or "\0" in lines[0]):
        warnings.warn(
            f"{path} has no header that begins with `step`: its {len(lines)} lines are dropped.", stacklevel=3
        )
        return []
    rows: list[dict[str, str]] = []
    damaged = []
    for number, line in enumerate(lines[1:], start=2):
        fields = next(csv.reader([line]), [])
        if _is_row(fields, columns) and (not rows or int(fields[0]) > int(rows[-1]["step"])):
            rows.append(dict(zip(columns, fields, strict=True)))
        else:
            damaged.append(number)
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + (", …" if len(damaged) > 5 else "")
        warnings.warn(f"{path}: {len(damaged)} damaged lines are dropped: {shown}.", stacklevel=3)
    return rows


def _is_row(fields: list[str], columns: list[str]) -> bool:
    """Returns whether the fields are a step and numbers, one per column."""
    if len(fields) != len(columns) or not (fields[0].isascii() and fields[0].isdecimal()):
        return False
    try:
        [float(field) for field in fields if field]
    except ValueError:
        return False
    return True


def _line(fields: list[str]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(fields)
    return buffer.getvalue().encode()


def _text(value: float) -> str:
    """Formats a number with all its digits, so that reading it back returns the same number."""
    number = float(value)
    return str(int(number)) if math.isfinite(number) and number == int(number) and abs(number) < 2**53 else repr(number)
