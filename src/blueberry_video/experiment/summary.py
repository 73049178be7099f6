"""Summary printed at the end of a run: metrics with their references, verdicts, and paths of the results."""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blueberry_video.experiment.expected import Verdict
from blueberry_video.experiment.run_folder import RunFolder

# A metric `m` is compared with `m_<suffix>` (docs/architecture.md, "Metrics"): suffix -> heading of its column.
REFERENCES = {"trivial": "trivial", "random_init": "random init", "scratch": "from scratch", "shuffled": "shuffled"}


@dataclass(frozen=True)
class Comparison:
    """Value of a metric and of its references by suffix."""

    metric: str
    value: float | None
    references: dict[str, float | None]


def comparisons(metrics: Mapping[str, float | None]) -> list[Comparison]:
    """Returns every metric that has a reference ``<metric>_trivial``, ``_random_init``, ``_scratch`` or ``_shuffled``.

    Args:
        metrics: the final metrics by name; ``None`` for a value that is not finite.
    """
    found = [
        Comparison(name, value, {key: metrics[f"{name}_{key}"] for key in REFERENCES if f"{name}_{key}" in metrics})
        for name, value in metrics.items()
    ]
    return [comparison for comparison in found if comparison.references]


def comparison_table(metrics: Mapping[str, float | None]) -> list[list[str]]:
    """Formats :func:`comparisons` as rows of text, the header first: metric, this run, a column per reference."""
    rows = comparisons(metrics)
    columns = [key for key in REFERENCES if any(key in row.references for row in rows)]
    header = ["metric", "this run", *(REFERENCES[key] for key in columns)]
    return [header, *([row.metric, *map(number, (row.value, *map(row.references.get, columns)))] for row in rows)]


def summary(run: RunFolder) -> str:
    """Returns the summary of a run from its ``run.json``: plain text, at most 100 columns except for long paths."""
    record = run.record
    reason = f": {record['ended_because']}" if record.get("ended_because") else ""
    parts = [f"{run.experiment} / {run.name}: {record['status']} after {duration(record['wall_seconds'])}{reason}"]
    table = comparison_table(record["metrics"])
    if len(table) > 1:
        parts.append(_aligned(table))
    if record["expected"]:
        parts.append("\n".join(["expected", *(f"  {Verdict(**verdict)}" for verdict in record["expected"])]))
    if skipped := skipped_files(record):
        parts.append(skipped)
    parts.append(_results(run, record["wandb"]))
    return "\n\n".join(parts)


def _results(run: RunFolder, wandb: dict[str, str | None]) -> str:
    report = run.path / "report.html"
    lines = [f"  report    {shown(report)}"] if report.is_file() else []
    if wandb.get("folder"):
        lines.append(f"  terminal  {_program('wandb')} leet {shown(run.path / str(wandb['folder']))}")
    if wandb.get("url"):
        lines.append(f"  wandb     {wandb['url']}")
    return "\n".join(["results", *lines, f"  files     {shown(run.path)}"])


def skipped_files(record: Mapping[str, Any]) -> str:
    """Returns the number of unreadable videos and the file that lists them; empty if there are none."""
    count = record.get("skipped", 0)
    return f"{count} video file{'' if count == 1 else 's'} skipped: skipped.csv" if count else ""


def shown(path: Path) -> str:
    """Formats a path relative to the working directory if it is inside it, otherwise unchanged."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def number(value: float | None) -> str:
    """Formats a number with four significant digits; ``None`` as a dash."""
    return "-" if value is None else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Formats a duration as ``42 s``, ``3 min 20 s`` or ``5 h 12 min``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Formats rows with columns of equal width, the first left-aligned and the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("   ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def _program(name: str) -> str:
    """Returns a command that starts a program of this environment, active or not."""
    program = Path(sys.executable).with_name(name)
    return name if shutil.which(name) or not program.is_file() else os.path.relpath(program)
