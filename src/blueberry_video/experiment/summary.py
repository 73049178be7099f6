"""What a run prints at its end: what was learned against what a trivial model gets, and where to look."""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blueberry_video.experiment.expected import Verdict
from blueberry_video.experiment.run_folder import RunFolder

# A metric `m` is compared with `m_<suffix>` (docs/architecture.md, "Metrics"); here with the heading of its column.
REFERENCES = {"trivial": "trivial", "random_init": "random init", "scratch": "from scratch", "shuffled": "shuffled"}


@dataclass(frozen=True)
class Comparison:
    """A metric's value beside those it must be compared with, by suffix."""

    metric: str
    value: float | None
    references: dict[str, float | None]


def comparisons(metrics: Mapping[str, float | None]) -> list[Comparison]:
    """Every metric that has a companion ``<metric>_trivial``, ``_random_init``, ``_scratch`` or ``_shuffled``.

    Args:
        metrics: the final metrics by name; ``None`` is a value that was not finite.
    """
    found = [
        Comparison(name, value, {key: metrics[f"{name}_{key}"] for key in REFERENCES if f"{name}_{key}" in metrics})
        for name, value in metrics.items()
    ]
    return [comparison for comparison in found if comparison.references]


def summary(run: RunFolder) -> str:
    """The closing text of a run, from its ``run.json``: plain, at most 100 columns but for long paths."""
    record = run.record
    parts = [f"{run.experiment} / {run.name}: {record['status']} after {duration(record['wall_seconds'])}"]
    rows = comparisons(record["metrics"])
    if rows:
        columns = [key for key in REFERENCES if any(key in row.references for row in rows)]
        header = ["learned", "this run", *(REFERENCES[key] for key in columns)]
        table = [[row.metric, number(row.value), *(number(row.references.get(key)) for key in columns)] for row in rows]
        parts.append(_aligned([header, *table]))
    if record["expected"]:
        parts.append("\n".join(["expected", *(f"  {Verdict(**verdict)}" for verdict in record["expected"])]))
    if skipped := skipped_files(record):
        parts.append(skipped)
    parts.append(_where_to_look(run, record["wandb"]))
    return "\n\n".join(parts)


def _where_to_look(run: RunFolder, wandb: dict[str, str | None]) -> str:
    report = run.path / "report.html"
    lines = [f"  report    {shown(report)}"] if report.is_file() else []
    if wandb.get("folder"):
        lines.append(f"  terminal  {_program('wandb')} leet {shown(run.path / str(wandb['folder']))}")
    if wandb.get("url"):
        lines.append(f"  wandb     {wandb['url']}")
    return "\n".join(["where to look", *lines, f"  files     {shown(run.path)}"])


def skipped_files(record: Mapping[str, Any]) -> str:
    """How many videos the run could not read and where they are listed; empty where it read all."""
    count = record.get("skipped", 0)
    return f"{count} video file{'' if count == 1 else 's'} skipped: skipped.csv" if count else ""


def shown(path: Path) -> str:
    """A path as one types it: relative to the working directory where it lies in it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def number(value: float | None) -> str:
    """Four significant digits; a dash where there is no value."""
    return "-" if value is None else f"{value:.4g}"


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 20 s`` or ``5 h 12 min``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left and the numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("   ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def _program(name: str) -> str:
    """A command that starts a program of this environment whether or not the environment is active."""
    beside = Path(sys.executable).with_name(name)
    return name if shutil.which(name) or not beside.is_file() else os.path.relpath(beside)
