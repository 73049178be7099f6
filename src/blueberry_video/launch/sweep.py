"""Points of a sweep: a failing point does not end the sweep, which ends with one table of all points."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from blueberry_video.atomic import write_text
from blueberry_video.launch.errors import TRACEBACK_VARIABLE, paragraph

SIGNALS = (130, 143)  # exit codes of Ctrl-C and SIGTERM, which end a sweep
WIDTH = 100  # of an error in the table


def run(sweep: Callable[[], Any], folder: Path) -> None:
    """Runs a sweep, prints the table of its points, and exits with code 1 if one of them did not finish."""
    try:
        sweep()
    finally:
        text, failed = table(folder)
        print(f"\n{text}" if text else "", flush=True)
    if failed:
        sys.exit(1)


def run_point(
    folder: Path,
    number: int,
    overrides: Sequence[str],
    metrics: Sequence[str],
    run: Callable[[list[Path]], float | None],
) -> float | None:
    """Runs a point and records its state, metrics and error in ``<folder>/points/<number>.json``.

    Args:
        folder: folder of the sweep.
        number: index of the point.
        overrides: ``key=value`` of the point.
        metrics: names of the metrics in the table.
        run: trains; appends the run folder to its argument and returns the objective.

    Returns:
        The objective; NaN for a failed point, which Hydra's sweepers accept.
    """
    file, runs = folder / "points" / f"{number}.json", list[Path]()
    file.parent.mkdir(parents=True, exist_ok=True)
    point: dict[str, Any] = {
        "number": number,
        "overrides": [*overrides],
        "state": "running",
        "metrics": {},
        "error": "",
    }

    def record(state: str, error: str = "") -> None:
        known = json.loads((runs[0] / "run.json").read_text())["metrics"] if runs else {}
        point.update(state=state, error=error, metrics={name: known[name] for name in metrics if name in known})
        write_text(file, json.dumps(point))

    record("running")
    try:
        objective = run(runs)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code in SIGNALS:
            record("interrupted")
            raise
        message = str(error) if isinstance(error, SystemExit) else paragraph(error)
        if message is None or os.environ.get(TRACEBACK_VARIABLE) == "1":
            traceback.print_exception(error)
        message = message or f"{type(error).__name__}: {error}"
        print(f"\nError in point {number}: {message.strip()}", file=sys.stderr, flush=True)
        record("failed", next(iter(message.strip().splitlines()), ""))
        return float("nan")
    except BaseException:
        record("interrupted")
        raise
    record("finished")
    return objective


def table(folder: Path) -> tuple[str, int]:
    """Returns the table of the points recorded in the folder of a sweep, and the number of points not finished."""
    files = sorted((folder / "points").glob("*.json"), key=lambda file: int(file.stem))
    points = [json.loads(file.read_text()) for file in files]
    if not points:
        return "", 0
    common = set.intersection(*(set(point["overrides"]) for point in points)) if len(points) > 1 else set()
    names = list(dict.fromkeys(name for point in points for name in point["metrics"]))
    rows = [["point", "state", *names, "error"]]
    for point in points:
        values = [_number(point["metrics"].get(name)) for name in names]
        changed = " ".join(word for word in point["overrides"] if word not in common) or str(point["number"])
        error = point["error"] if len(point["error"]) <= WIDTH else f"{point['error'][: WIDTH - 1]}…"
        rows.append([changed, point["state"], *values, error])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    failed = sum(point["state"] != "finished" for point in points)
    lines.append(f"{len(points) - failed} of {len(points)} points finished; sweep: {folder}")
    return "\n".join(lines), failed


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
