"""Points of a sweep or of a submission: one run each, with a record in ``<sweep>/points/<number>.json``.

The process that trains a point writes its state, run folder, metrics and error there. A point is identified by its
resolved config, so that a sweep that was killed finds the points that it has finished.
"""

import hashlib
import json
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from blueberry_video.atomic import write_text
from blueberry_video.config.resume import OF_A_CALL
from blueberry_video.launch.errors import TRACEBACK_VARIABLE, paragraph

FILE_VARIABLE = "BLUEBERRY_VIDEO_POINT"  # the record of the point that this process trains
SIGNALS = (129, 130, 143)  # exit codes of SIGHUP, Ctrl-C and SIGTERM
WIDTH = 100  # of an error in the table
EMPTY: dict[str, Any] = {"state": "pending", "run": None, "metrics": {}, "objective": None, "error": "", "log": None}

Created = Callable[[Path], None]


def key(config: DictConfig) -> str:
    """Returns the identity of a point: a hash of its resolved config without the keys of a call, such as the folder
    of the runs."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    text = json.dumps({name: value for name, value in plain.items() if name not in OF_A_CALL}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def metric_names(config: DictConfig) -> list[str]:
    """Returns the metrics that the table of a sweep shows: the objective, and those with an expected value."""
    names = (config.get("optimized_metric"), *(config.get("expected") or ()))
    return list(dict.fromkeys(str(name) for name in names if name))


def describe(number: int, overrides: Sequence[str], config: DictConfig) -> dict[str, Any]:
    """Returns the record of a point that has not started."""
    description = {"number": number, "overrides": [*overrides], "key": key(config), "names": metric_names(config)}
    return {**description, **EMPTY}


def file_of(folder: Path, number: int) -> Path:
    return folder / "points" / f"{number}.json"


def read(folder: Path) -> list[dict[str, Any]]:
    """Returns the records of the points of a sweep, by number."""
    files = sorted((folder / "points").glob("*.json"), key=lambda file: int(file.stem))
    return [json.loads(file.read_text()) for file in files]


def write(file: Path, record: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(record))


def update(file: Path, **values: Any) -> None:
    """Replaces values of a record."""
    write(file, {**json.loads(file.read_text()), **values})


def run_to_resume(record: Mapping[str, Any]) -> str | None:
    """Returns the name of the run that a point has begun; None if there is none, or it was removed."""
    run = Path(record["run"]) if record["run"] else None
    return run.name if run is not None and (run / "run.json").is_file() else None


def recorded(file: Path, train: Callable[[Created, str | None], float | None]) -> float | None:
    """Trains a point and records its state.

    Args:
        file: the record of the point.
        train: trains; receives a function to be called with the run folder, and the run to resume, if there is one;
            returns the objective.

    Returns:
        The objective.

    Raises:
        BaseException: any error of ``train``.
    """
    record: dict[str, Any] = json.loads(file.read_text())

    def save(state: str, **values: Any) -> None:
        run = Path(record["run"], "run.json") if record["run"] else None
        known = json.loads(run.read_text())["metrics"] if run is not None and run.is_file() else {}
        metrics = {name: known[name] for name in record["names"] if name in known}
        record.update(state=state, metrics=metrics, **values)
        write(file, record)

    def created(run: Path) -> None:
        save("running", run=str(run))

    resumed = run_to_resume(record)
    save("running", error="", run=record["run"] if resumed else None)
    try:
        objective = train(created, resumed)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code in SIGNALS:
            save("interrupted")
        elif isinstance(error, BlockingIOError):  # the run is alive in a different process
            record["state"] = "running"
            write(file, record)
        else:
            save("failed", error=next(iter(message(error).splitlines()), ""))
        raise
    except BaseException:
        save("interrupted")
        raise
    save("finished", objective=objective)
    return objective


def message(error: BaseException) -> str:
    """Returns the message of an error in one paragraph."""
    if isinstance(error, SystemExit):
        return str(error).strip()
    return (paragraph(error) or f"{type(error).__name__}: {error}").strip()


def report(error: BaseException, number: int, folder: Path) -> str:
    """Returns the paragraph that a failed point prints. The traceback is written to the folder of the sweep, and
    printed too if ``BLUEBERRY_TRACEBACK=1``."""
    text = message(error)
    verbose = os.environ.get(TRACEBACK_VARIABLE) == "1"
    if verbose:
        traceback.print_exception(error)
    if not isinstance(error, SystemExit) and (paragraph(error) is None or verbose):
        log = folder / "logs" / f"{number}_traceback.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(traceback.format_exception(error)))
        update(file_of(folder, number), log=str(log))
        text = f"{text.rstrip('.')}. The traceback is in {log}."
    return text


def table(folder: Path) -> tuple[str, int]:
    """Returns the table of the points of a sweep, and the number of points that are not finished."""
    points = read(folder)
    if not points:
        return "", 0
    common = set.intersection(*(set(point["overrides"]) for point in points)) if len(points) > 1 else set()
    names = list(dict.fromkeys(name for point in points for name in point["metrics"]))
    rows = [["point", "state", *names, "error"]]
    for point in points:
        values = [_number(point["metrics"].get(name)) for name in names]
        error = point["error"] if len(point["error"]) <= WIDTH else f"{point['error'][: WIDTH - 1]}…"
        rows.append([title(point, common), point["state"], *values, error])
    lines = aligned(rows)
    failed = sum(point["state"] != "finished" for point in points)
    lines.append(f"{len(points) - failed} of {len(points)} points finished; sweep: {folder}")
    return "\n".join(lines), failed


def title(point: Mapping[str, Any], common: set[str]) -> str:
    """Returns the overrides of a point that other points do not have."""
    return " ".join(word for word in point["overrides"] if word not in common) or str(point["number"])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the rows of a table as lines, with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
