"""``blueberry torture``: kills a run at random moments, resumes it, and compares it with the uninterrupted run.

    python -m blueberry_video.launch.torture --config-dir experiments/<name> [--kills 50] [--out folder] [key=value …]

The moments are seeded and fall into starts, steps, saves, validations, log flushes and evaluations. Weights, optimizer
state, averages and metrics must be equal bit for bit, except for measured times.
"""

import argparse
import csv
import itertools
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

from blueberry_video.launch import command_line
from blueberry_video.launch.errors import OneParagraphErrors

PRELOADED = ("lightning", "wandb", "torchmetrics", "blueberry_video.callbacks", "blueberry_video.experiment.loggers")
TIMES = ("throughput/",)  # of metrics that are measured times
CHECKPOINTS = (".ckpt", ".shards")
LIMIT = 200  # sessions of one run


class Outcome(NamedTuple):
    """Outcome of a run that was killed and resumed.

    Attributes:
        kills: number of kills, by what the run did: start, training, saving, end (evaluation and report).
        differences: what differs from the uninterrupted run; empty if nothing does.
        seconds: duration of the last session.
    """

    kills: Counter[str]
    differences: list[str]
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="blueberry torture", allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=50, help="number of kills")
    parser.add_argument("--out", default="outputs/torture", help="folder of the runs; emptied first")
    parser.add_argument("--moments", type=int, default=0, help="seed of the moments")
    known, rest = parser.parse_known_args(sys.argv[1:])
    if known.kills < 1:
        raise ValueError(f"--kills {known.kills} must be at least 1.")
    config = command_line.parse(rest).config()
    out = Path(known.out) / config.name
    shutil.rmtree(out, ignore_errors=True)
    os.environ.setdefault("WANDB_MODE", "offline")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    if code := _session(context, rest, out / "uninterrupted", None)[0]:
        raise RuntimeError(f"the uninterrupted run ends with exit code {code}: see {out}/uninterrupted/log.txt.")
    seconds = _session(context, rest, out / "timed", None)[1]  # the first also fills caches
    print(f"uninterrupted run: {seconds:.1f} s", flush=True)
    reference, draws, left, failed = _run(out / "uninterrupted"), random.Random(known.moments), known.kills, 0
    rows: list[tuple[str, ...]] = [("run", "kills", "start", "training", "saving", "end", "equal")]
    print(_row(rows[0]), flush=True)
    while left > 0:
        folder = out / f"killed_{len(rows)}"
        outcome = torture(context, rest, folder, reference, seconds, draws, left)
        left -= outcome.kills.total()
        failed += bool(outcome.differences)
        if not outcome.kills:  # the machine has become faster
            seconds = outcome.seconds
        counts = [str(outcome.kills[phase]) for phase in rows[0][2:-1]]
        rows.append((str(len(rows)), str(outcome.kills.total()), *counts, ", ".join(outcome.differences) or "yes"))
        print(_row(rows[-1]), flush=True)
    print(f"{known.kills - left} kills in {len(rows) - 1} runs: {failed} differ from the uninterrupted run")
    sys.exit(bool(failed))


def torture(
    context: ForkServerContext,
    words: Sequence[str],
    folder: Path,
    reference: Path,
    seconds: float,
    draws: random.Random,
    most: int,
) -> Outcome:
    """Trains one run, killing it up to ``most`` times, and compares it.

    Args:
        context: starts the sessions.
        words: command line of ``train``.
        folder: folder of the runs of the killed experiment.
        reference: the uninterrupted run.
        seconds: its duration.
        draws: generator of the moments.
        most: largest number of kills.
    """
    kills, identity = Counter[str](), None
    for _ in range(LIMIT):
        delay = draws.uniform(0, seconds) if kills.total() < most else None
        resume = ["resume=last"] if any(folder.glob("*/*/run.json")) else []
        code, last = _session(context, [*words, *resume], folder, delay)
        run = _run(folder) if any(folder.glob("*/*/run.json")) else None
        if code == 0 and run is not None:
            break
        if code != -signal.SIGKILL:
            session = f"session {kills.total() + 1} ended with exit code {code}, see {folder}/log.txt"
            return Outcome(kills, [session], last)
        kills[_phase(run)] += 1
        if run is not None and (run / "run.json").is_file():
            identity = identity or json.loads((run / "run.json").read_text())["wandb"]["id"]
    else:
        return Outcome(kills, [f"not finished after {LIMIT} sessions"], last)
    found = list(_differences(reference, run))
    if identity is not None and json.loads((run / "run.json").read_text())["wandb"]["id"] != identity:
        found.append("wandb run")
    if len([*folder.glob("*/*/run.json")]) > 1:
        found.append("more than one run folder")
    return Outcome(kills, found, last)


def _session(
    context: ForkServerContext, words: Sequence[str], folder: Path, seconds: float | None
) -> tuple[int | None, float]:
    """Trains in a new process, which is killed after ``seconds``; returns its exit code and its duration."""
    folder.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_train, args=([*words, f"output_dir={folder}"], folder / "log.txt"))
    began = time.perf_counter()
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode, time.perf_counter() - began


def _train(words: list[str], log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["train", *words]
    runpy.run_module("blueberry_video.train", run_name="__main__")


def _run(folder: Path) -> Path:
    return next(folder.glob("*/*/run.json")).parent


def _phase(run: Path | None) -> str:
    """Describes what a killed run did, from its files."""
    if run is None or not (run / "run.json").is_file():
        return "start"
    checkpoints = run / "checkpoints"
    names = [file.name for file in checkpoints.iterdir()] if checkpoints.is_dir() else []
    if any(not name.endswith((*CHECKPOINTS, ".sha256")) for name in names):
        return "saving"
    if (run / "end_of_run.json").is_file() or json.loads((run / "run.json").read_text())["status"] == "finished":
        return "end"
    return "training" if names else "start"


def _differences(first: Path, second: Path) -> Iterator[str]:
    """Yields what differs between two finished runs."""
    import torch

    from blueberry_video.parallel.sharded_checkpoint import is_sharded, read_shards

    files = [max(_checkpoints(run / "checkpoints"), key=lambda file: file.name) for run in (first, second)]
    if files[0].name != files[1].name:
        yield f"{files[1].name} instead of {files[0].name}"
        return
    contents = [
        read_shards(file) if is_sharded(file) else torch.load(file, map_location="cpu", weights_only=True)
        for file in files
    ]
    states = [dict(_leaves(content)) for content in contents]
    names = (name for name in sorted(states[0].keys() | states[1].keys()) if not any(time in name for time in TIMES))
    yield from (name for name in names if not _equal(states[0].get(name), states[1].get(name)))
    tables = [_rows(run / "metrics.csv") for run in (first, second)]
    for one, other in itertools.zip_longest(*tables, fillvalue={}):
        if changed := [name for name in {**one, **other} if one.get(name) != other.get(name)]:
            yield f"metrics.csv step {(one or other)['step']}: {changed[0]}"
            break
    steps = [int(row["step"]) for row in tables[1]]
    if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        yield "steps of metrics.csv"
    ends = [_without_times(json.loads((run / "run.json").read_text())["metrics"]) for run in (first, second)]
    if ends[0] != ends[1]:
        yield "metrics of run.json"


def _checkpoints(folder: Path) -> list[Path]:
    return [file for file in folder.glob("step_*") if file.suffix in CHECKPOINTS]


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _leaves(part, f"{name}[{index}]")
    else:
        yield name, value


def _equal(first: Any, second: Any) -> bool:
    import torch

    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return first == second or (first != first and second != second)  # NaN


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        rows = [_without_times(row) for row in csv.DictReader(lines)]
    return [row for row in rows if any(value for name, value in row.items() if name != "step")]


def _without_times(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not name.startswith(TIMES)}


def _row(cells: Sequence[str]) -> str:
    return "  ".join(cell.ljust(8) for cell in cells).rstrip()


if __name__ == "__main__":
    with OneParagraphErrors():
        main()
