"""Entry point of ``blueberry runs``: table of the submitted and local runs, the newest last.

python -m blueberry_video.runs [EXPERIMENT] [--output-dir outputs] [--last 30]
"""

import argparse
import os
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from blueberry_video.config import Config, did_you_mean
from blueberry_video.experiment import run_states
from blueberry_video.launch import job_states, points
from blueberry_video.launch.errors import OneParagraphErrors
from blueberry_video.launch.sweep_folder import SweepFolder

WIDTH = 40  # of the overrides of a point


class Row(NamedTuple):
    """Row of the table.

    Attributes:
        since: time of the start, or of the submission, ISO 8601.
        cells: values of the columns, see :data:`COLUMNS`.
        note: line below the table, about a failure; empty: none.
    """

    since: str
    cells: list[str]
    note: str = ""


COLUMNS = ["job", "experiment", "point", "run", "state", "step", "since", "metric"]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="blueberry runs")
    parser.add_argument("experiment", nargs="?", help="name of an experiment; all if missing")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="folder of all runs")
    parser.add_argument("--last", type=int, default=30, help="number of rows")
    options = parser.parse_args(arguments)
    names = sorted(path.name for path in options.output_dir.glob("*") if path.is_dir())
    if options.experiment and options.experiment not in names:
        hint = did_you_mean(options.experiment, names) if names else "There are no runs."
        raise FileNotFoundError(f"EXP={options.experiment} has no runs in {options.output_dir}. {hint}")
    slurm = job_states.slurm_states()
    found = [
        row
        for name in ([options.experiment] if options.experiment else names)
        for row in rows(options.output_dir / name, slurm)
    ]
    shown = sorted(found, key=lambda row: row.since)[-options.last :]
    if not shown:
        print(f"no runs in {options.output_dir}")
        return
    print("\n".join(points.aligned([COLUMNS, *(row.cells for row in shown)])))
    if len(found) > len(shown):
        print(f"the newest {len(shown)} of {len(found)}; --last {len(found)} shows all")
    for row in shown:
        if row.note:
            print(f"\n{row.note}")


def rows(experiment: Path, slurm: dict[str, str] | None) -> Iterator[Row]:
    """Yields the rows of an experiment: the points of its submissions and sweeps, then its other runs."""
    listed = set()
    for file in sorted(experiment.glob("submissions/*/sweep.json")) + sorted(experiment.glob("sweeps/*/sweep.json")):
        sweep, records = SweepFolder(file.parent).record, points.read(file.parent)
        states = job_states.states_of(file.parent, slurm)
        common = set.intersection(*(set(each["overrides"]) for each in records)) if len(records) > 1 else set()
        for record in records:
            job = sweep.get("jobs", {}).get(str(record["number"]), "")
            run = Path(record["run"]) if record["run"] else None
            listed.add(run.name if run else "")
            state = states[record["number"]]
            logs = [record["log"]] if record["log"] else sorted(map(str, file.parent.glob(f"logs/{job}_*_log.*")))
            note = ""
            if state in ("failed", "lost", "interrupted"):
                error = f": {record['error'].rstrip('.')}" if record["error"] else ""
                where = f" Log: {' '.join(map(shown, logs))}" if job or logs else ""
                note = f"{experiment.name} {points.title(record, common)} {state}{error}.{where}"
            title = points.title(record, common)
            short = title if len(title) <= WIDTH else f"…{title[1 - WIDTH :]}"  # the last overrides are the swept ones
            yield _row(experiment.name, job, short, run, state, sweep["started"], note)
    for file in experiment.glob("*/run.json"):
        if file.parent.name not in listed:
            yield _row(experiment.name, "", "", file.parent, "", "", "")


def _row(experiment: str, job: str, point: str, run: Path | None, state: str, since: str, note: str) -> Row:
    """Returns a row; ``state`` is empty for a run that is no point."""
    record = run_states.read(run) if run is not None else {}
    since = record.get("started") or since
    if not state:
        state = run_states.state(run, record) if run is not None else ""
        if state in ("failed", "lost", "interrupted"):
            note = f"{experiment} {run.name if run else ''} {state}: {record.get('error') or 'it was killed'}"
    metrics, objective = record.get("metrics") or {}, Config.optimized_metric
    value = metrics.get(objective)
    metric = "" if value is None else f"{objective} {value:.4g}"
    cells = [
        job,
        experiment,
        point,
        run.name if run else "",
        state,
        run_states.steps(run, record) if run is not None else "",
        _time(since),
        metric,
    ]
    return Row(since, [cell or "-" for cell in cells], note)


def _time(text: str) -> str:
    return datetime.fromisoformat(text).strftime("%m-%d %H:%M") if text else ""


def shown(path: str) -> str:
    """Returns a path relative to the working directory, if it is inside it."""
    here = os.getcwd()
    return os.path.relpath(path, here) if path.startswith(f"{here}/") else path


if __name__ == "__main__":
    with OneParagraphErrors():
        main(sys.argv[1:])
