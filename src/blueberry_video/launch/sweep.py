"""Sweeps: every combination of ``key=a,b``, one run each; a sweep that was ended continues with what is missing.

The folder of a sweep, ``outputs/<experiment>/sweeps/<time>/``, contains ``sweep.json``, a record of each point, and
logs. The same command, given again after the sweep was killed, continues in its folder: finished points are not
trained again, interrupted ones continue from their checkpoint. After a sweep has ended, it starts a new one.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from blueberry_video import config as configs
from blueberry_video.launch import command_line, environment, points, pool
from blueberry_video.launch.sweep_folder import SweepFolder, now

Run = Callable[[DictConfig, command_line.Command | None, points.Created], float | None]
"""Executes one run: its config, the command line, and a function to be called with the run folder."""


def run(command: command_line.Command, hydra_main: Callable[[], Any]) -> None:
    """Runs a sweep, prints the table of its points, and exits with code 1 if one of them did not finish.

    Args:
        command: the command line.
        hydra_main: runs the points with Hydra's launcher and sweeper, from ``sys.argv``; not used for parallel points
            (``--jobs``).
    """
    expanded = command.points()
    slots = pool.slots(command.jobs, expanded.configs[0][1]) if command.jobs > 1 else []
    if slots and (dynamic := _is_dynamic(expanded)):
        raise ValueError(
            f"--jobs {command.jobs} (JOBS={command.jobs}) needs a list of points, and {dynamic} chooses them during "
            "the sweep: use `hydra/launcher=joblib` with `hydra.launcher.n_jobs`."
        )
    if slots and environment.recognize().is_external:
        raise ValueError(
            f"--jobs {command.jobs} (JOBS={command.jobs}) starts a process per point, and `torchrun` or `srun` started "
            "several processes for every point: leave one of them out."
        )
    folder = _open(command, expanded)
    folder.update(retry=command.retry is not None, fail_fast=command.fail_fast, ended=None)
    try:
        if slots:
            pool.run(folder.path, slots, retry=command.retry is not None, fail_fast=command.fail_fast)
        else:
            sys.argv[1:] = command.hydra_words(folder.path)
            hydra_main()
        folder.update(ended=now())
    finally:
        text, failed = points.table(folder.path)
        print(f"\n{text}" if text else "", flush=True)
    if failed:
        print(failures(command, folder.path), end="", flush=True)
        sys.exit(1)


def run_point(config: DictConfig, run: Run) -> float | None:
    """Runs the point of a sweep that Hydra composed, and records it; a failing point does not end the sweep.

    Returns:
        The objective; NaN for a failed point, which Hydra's sweepers accept.

    Raises:
        SystemExit: after a signal, or after a failure with ``--fail-fast``.
    """
    job = HydraConfig.get()
    words = list(job.overrides.task)
    config = configs.resolve(config, allow=configs.trusted_targets(words))
    return run_resolved(Path(job.sweep.dir), job.job.num, words, config, run)


def run_resolved(folder: Path, number: int, overrides: Sequence[str], config: DictConfig, run: Run) -> float | None:
    """Runs a point of the sweep ``folder``, see :func:`run_point`.

    Args:
        folder: the folder of the sweep.
        number: index of the point.
        overrides: its overrides.
        config: its resolved config.
        run: executes the run.
    """
    sweep = SweepFolder(folder).record
    file = _file_of(folder, points.describe(number, overrides, config))
    record = json.loads(file.read_text())
    number = record["number"]
    if record["state"] == "finished":
        print(f"point {number} is finished: {record['run']}", flush=True)
        return record["objective"]
    if record["state"] == "failed" and not sweep.get("retry"):
        print(f"point {number} failed before, and is not trained again: {record['error']}", flush=True)
        return float("nan")

    def train(created: points.Created, resumed: str | None) -> float | None:
        if resumed is None:
            return run(config, None, created)
        with open_dict(config):
            config.resume = resumed
        with _without_hydra():
            return run(config, command_line.Command(Path(sweep["file"]), False, [*overrides], False), created)

    try:
        return points.recorded(file, train)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code in points.SIGNALS:
            raise
        print(f"\nError in point {number}: {points.report(error, number, folder)}", file=sys.stderr, flush=True)
        if sweep.get("fail_fast"):
            raise SystemExit(1) from None
        return float("nan")


def run_single(command: command_line.Command, run: Run) -> None:
    """Executes a single run. If it is a point of a sweep or of a submission, records it, and resumes the run that the
    point has begun."""
    file = os.environ.get(points.FILE_VARIABLE)
    if file is None:
        run(command.config(), command, lambda folder: None)
        return

    def train(created: points.Created, resumed: str | None) -> float | None:
        resume = [f"resume={resumed}"] if resumed is not None else []
        resuming = command._replace(overrides=[*command.overrides, *resume])
        return run(resuming.config(), resuming, created)

    points.recorded(Path(file), train)


def failures(command: command_line.Command, folder: Path) -> str:
    """Returns a paragraph for each failed point, with its log, and the command that retries them."""
    lines = []
    for record in points.read(folder):
        if record["state"] == "failed":
            log = f" Log: {record['log'] or record['run']}" if record["log"] or record["run"] else ""
            lines.append(f"point {record['number']} failed: {record['error'].rstrip('.')}.{log}")
    if lines:
        lines.append(f"`{command.again(RETRY='failed')}` trains the failed points again.")
    return "".join(f"{line}\n" for line in lines)


@contextmanager
def _without_hydra() -> Iterator[None]:
    """Context manager in which configs can be composed, although Hydra runs a sweep in this process."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = outer


def _open(command: command_line.Command, expanded: command_line.Points) -> SweepFolder:
    """Returns the folder of the sweep that continues, or a new one, locked.

    Raises:
        ValueError: if failed points are to be retried, and there are none.
    """
    records = [
        {**points.describe(number, words, config), "command": [*command.of_experiment(), *words]}
        for number, (words, config) in enumerate(expanded.configs)
    ]
    keys, dynamic = [record["key"] for record in records], _is_dynamic(expanded)
    found = _newest(expanded.folder.parent, keys, command.overrides if dynamic else None)
    states = found.states() if found else []
    if command.retry and "failed" not in states:
        where = f"the sweep {found.path} has" if found else "there is no earlier sweep of these points, with"
        raise ValueError(
            f"--retry {command.retry} (RETRY={command.retry}): {where} no failed point. Without it, the command starts "
            "a sweep, or continues one that was interrupted."
        )
    if found is not None and not command.new and (found.record["ended"] is None or command.retry):
        if found.lock():
            done = f"{states.count('finished')} of {len(states)} points finished, {states.count('failed')} failed"
            print(f"continuing the sweep {found.path}: {done}. A new sweep: --new (NEW=1)", flush=True)
            return found
        print(f"the sweep {found.path} of the same points is running: this is a new one", flush=True)
    file, words = str(command.file.absolute()), command.overrides
    return SweepFolder.create(expanded.folder, [] if dynamic else records, file=file, overrides=words, keys=keys)


def _is_dynamic(expanded: command_line.Points) -> str:
    """Returns what chooses the points during the sweep; empty if they are known before."""
    return expanded.interval or (expanded.sweeper if expanded.sweeper != "basic" else "")


def _newest(root: Path, keys: Sequence[str], overrides: list[str] | None) -> SweepFolder | None:
    """Returns the newest sweep below ``root`` with the same points, and the same overrides if they are given."""
    sweeps = [SweepFolder(file.parent) for file in root.glob("*/sweep.json")]
    for sweep in sorted(sweeps, key=lambda sweep: sweep.record["started"], reverse=True):
        record = sweep.record
        if sorted(record["keys"]) == sorted(keys) and overrides in (None, record["overrides"]):
            return sweep
    return None


def _file_of(folder: Path, description: dict[str, Any]) -> Path:
    """Returns the record of a point of a sweep, which is found by its config; creates it if there is none."""
    same = [record for record in points.read(folder) if record.get("key") == description["key"]]
    numbers = [record["number"] for record in same]
    number = description["number"]
    if same and number not in numbers:
        number = numbers[0]
    file = points.file_of(folder, number)
    while not same and file.is_file():  # a sweeper that chooses its points counts from 0 again
        number += 1
        file = points.file_of(folder, number)
    if not same:
        points.write(file, {**description, "number": number})
    return file
