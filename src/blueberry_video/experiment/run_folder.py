"""Run folder: creation, record, and opening it again to resume, report or evaluate a run.

``outputs/<experiment>/<run>/`` contains ``config.yaml`` (resolved; training on it repeats the run), ``run.json``
(provenance, status, results, and overrides of sessions that resumed it), ``metrics.csv``, ``checkpoints/``,
``media/``, ``wandb/`` and ``report.html``. All JSON is written atomically.
"""

import argparse
import csv
import re
import secrets
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from blueberry_video.atomic import explained_errors, write_text
from blueberry_video.config import Change, Config, did_you_mean, repeat
from blueberry_video.experiment.checkpoint import (
    check_accumulation,
    checkpoint_files,
    checkpoint_step,
    latest_good_checkpoint,
)
from blueberry_video.experiment.expected import Verdict, judge
from blueberry_video.experiment.git import git_state
from blueberry_video.experiment.lock import RunLock, check_unlocked
from blueberry_video.experiment.provenance import hardware, versions
from blueberry_video.experiment.record import read_record, write_record
from blueberry_video.launch import scheduler

MODE = {"resume": None, "check": False, "enforce_expected": False}
"""Config keys of a single call and their defaults; they are not saved, so that a later call does not inherit them."""


UNRELATED = ("logger", "optimized_metric")
"""Root keys that change no result of a finished run."""


class RunFolder:
    """Folder of one run. As a context manager it records how the run ended::

        with RunFolder.create(config) as run:
            trainer.fit(task, data, ckpt_path=run.checkpoint())
            verdicts = run.finish(metrics)

    An exception sets the status ``failed`` (or ``interrupted``) in ``run.json``; after a kill it stays ``running``.
    Only rank 0 writes.

    Attributes:
        path: the folder, absolute; equals ``trainer.default_root_dir``.
        resumed: whether the run continues from a checkpoint.
        on_close: functions called on exit with ``True`` if there was no exception, for example to close loggers.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.resumed = False
        self.on_close: list[Callable[[bool], None]] = []
        self._lock: RunLock | None = None

    @classmethod
    def create(cls, config: DictConfig, root: str | Path = "outputs") -> Self:
        """Creates ``<root>/<config.name>/<date_time>/`` with ``config.yaml`` and ``run.json``.

        Args:
            config: the composed config; ``name``, ``seed`` and, at the end, ``expected`` are read. The keys in ``MODE``
                are saved with their defaults.
            root: folder of all runs.

        Raises:
            ValueError: if the config has no ``name``.
        """
        experiment = config.get("name")
        if not experiment:
            raise ValueError(
                f"name={experiment!r} is missing in the config: set it, as in `name: my_idea`; the runs are written to "
                "outputs/my_idea/."
            )
        run = cls(_make_folder(Path(root) / experiment))
        rank_zero_only(write_text)(run.path / "config.yaml", saved_config(config))
        run.lock()
        write_record(
            run.path,
            {
                "experiment": experiment,
                "run": run.name,
                "status": "running",
                "started": _now(),
                "ended": None,
                "wall_seconds": 0.0,
                "session_started": time.time(),
                "seed": config.get("seed"),
                "job": scheduler.job(),
                **git_state(),
                "versions": versions(),
                "hardware": hardware(),
                "wandb": {"id": secrets.token_hex(4), "url": None},
                "resumes": [],
                "metrics": {},
                "expected": [],
                "skipped": 0,
                "error": None,
                "ended_because": None,
                "step": None,
            },
        )
        return run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Opens an existing run from its folder, or the newest run from the experiment's folder.

        Raises:
            FileNotFoundError: if neither contains a ``run.json``.
        """
        path = Path(path)
        if (path / "run.json").is_file():
            return cls(path)
        runs = list_runs(path)
        if not runs:
            others = [each.name for each in path.parent.glob("*") if each.name != path.name and list_runs(each)]
            raise FileNotFoundError(
                f"{path} contains no run (a folder with a run.json): use outputs/<experiment>[/<run>]."
                f"{f' {did_you_mean(path.name, others)}' if others else ''}"
            )
        return cls(runs[-1])

    @classmethod
    def resume(cls, experiment: str, run: str, root: str | Path = "outputs") -> Self:
        """Opens a run to continue its training, and records this in ``run.json``.

        Training continues from the newest valid checkpoint. A run without a checkpoint starts again in its folder, and
        its ``metrics.csv`` is removed.

        Args:
            experiment: name of the experiment.
            run: name of the run, or ``last`` for the newest run of the experiment.
            root: folder of all runs.

        Raises:
            FileNotFoundError: if the run does not exist, if none of its checkpoints is valid, or if it is finished and
                has no checkpoint. The run is not changed.
            BlockingIOError: if another process trains in the folder.
            ValueError: if its ``run.json`` is damaged.
        """
        found = cls.find(experiment, run, root)
        found.begin_session()
        return found

    @classmethod
    def find(cls, experiment: str, run: str, root: str | Path = "outputs", lock: bool = True) -> Self:
        """Opens a run to resume it, as :meth:`resume`, and locks it without changing its files.

        Args:
            experiment, run, root: see :meth:`resume`.
            lock: lock the run; otherwise only raise if it is locked.
        """
        found = cls(_find(Path(root) / experiment, run))
        found.resumed = True
        if lock:
            found.lock()
        else:
            check_unlocked(found.path)
        record, _ = found.record, found.config  # raise if damaged
        if found.checkpoint() is None and record["status"] == "finished":
            raise FileNotFoundError(
                f"resume={run}: the run {found.path} is finished and has no checkpoint: start a new run, "
                "without resume."
            )
        return found

    def begin_session(self, changes: Sequence[Change] = ()) -> None:
        """Records in ``run.json`` that training continues, and what the overrides of the command line changed.

        Args:
            changes: see :meth:`check_changes`, which is called first.
        """
        record, checkpoint = self.record, self.checkpoint()
        step = checkpoint_step(checkpoint) if checkpoint else 0
        if record["status"] == "running":  # it was killed: its newest file dates the end
            record["wall_seconds"] += max(_last_modified(self.path) - record["session_started"], 0.0)
        if checkpoint is None:
            for name in ("metrics.csv", "end_of_run.json"):
                rank_zero_only((self.path / name).unlink)(missing_ok=True)
        git = git_state()
        session = {"time": _now(), "previous_status": record["status"], "commit": git["commit"], "dirty": git["dirty"]}
        record["resumes"].append({**session, "changed": [change.record(step) for change in changes]})
        self.update(
            status="running",
            ended=None,
            error=None,
            ended_because=None,
            session_started=time.time(),
            job=scheduler.job(),
            resumes=record["resumes"],
            wall_seconds=record["wall_seconds"],
        )

    def check_changes(self, changes: Sequence[Change]) -> None:
        """Prints what the overrides of the command line change, and checks it against the checkpoint.

        Raises:
            ValueError: if gradients of the checkpoint's epoch would be accumulated over a different number of batches.
        """
        checkpoint = self.checkpoint()
        accumulation = [change.new for change in changes if change.name == "trainer.accumulate_grad_batches"]
        if checkpoint is not None and accumulation:
            check_accumulation(checkpoint, accumulation[0])
        for change in changes:
            rank_zero_only(print)(f"  {change}", flush=True)

    def is_complete(self, config: DictConfig, changes: Sequence[Change] = ()) -> bool:
        """Returns whether a finished run has no step left.

        Args:
            config: the config with which it is resumed.
            changes: its differences from the config of the run.

        Raises:
            ValueError: if there are any that would replace results of the same weights.
        """
        record, trainer = self.record, config.trainer
        files = checkpoint_files(self.path / "checkpoints")
        step = record.get("step") or (checkpoint_step(files[0]) if files else 0)
        reached = 0 < (trainer.get("max_steps") or -1) <= step
        epochs = re.fullmatch(r"trainer.max_epochs=(\d+) reached", record.get("ended_because") or "")
        reached |= epochs is not None and 0 < (trainer.get("max_epochs") or -1) <= int(epochs[1])
        if record["status"] != "finished" or not reached:
            return False
        length = ("trainer.max_steps", "trainer.max_epochs")
        if values := ", ".join(
            f"{change.name}={change.new}"
            for change in changes
            if change.key[0] not in UNRELATED and change.name not in length
        ):
            raise ValueError(
                f"resume={self.name}: the run is finished at step {step}, and {values} would replace the results of "
                "the same weights. Raise trainer.max_steps to continue training, leave the overrides out, or start a "
                f"new run with init_from={self.path}."
            )
        return True

    @property
    def name(self) -> str:
        """Name of the run, which is the name of its folder."""
        return self.path.name

    @property
    def experiment(self) -> str:
        """Name of the experiment, which is the name of the parent folder."""
        return self.path.parent.name

    @property
    def config(self) -> DictConfig:
        """The resolved config of the run, with the changes of sessions that resumed it with overrides."""
        file = self.path / "config.yaml"
        try:
            config = OmegaConf.load(file)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: also of UTF-8
            raise ValueError(
                f"{file} is damaged: {str(error).splitlines()[0]}. Restore the file of the run."
            ) from error
        if not isinstance(config, DictConfig) or not config:
            raise ValueError(f"{file} is empty or not a mapping of keys: restore the file written by the run.")
        return repeat(config, self.record.get("resumes", ()))

    @property
    def record(self) -> dict[str, Any]:
        """The contents of ``run.json``."""
        return read_record(self.path)

    def update(self, **fields: Any) -> None:
        """Replaces fields of ``run.json``."""
        write_record(self.path, {**self.record, **fields})

    @rank_zero_only
    def lock(self, rank: bool = False) -> None:
        """Locks the folder until the end of the ``with`` block or of the process.

        Args:
            rank: lock as rank 0 of a run that another process started.

        Raises:
            BlockingIOError: if another process trains in the folder.
        """
        self._lock = RunLock(self.path, rank)

    def checkpoint(self) -> Path | None:
        """Returns the newest valid checkpoint of a resumed run, or ``None`` if training starts from step 0.

        Raises:
            FileNotFoundError: if a resumed run has checkpoints and none is valid.
        """
        folder = self.path / "checkpoints"
        return latest_good_checkpoint(folder) if self.resumed and checkpoint_files(folder) else None

    @rank_zero_only
    def print_start(self, max_steps: int | None) -> None:
        """Prints the step at which a resumed run continues.

        Args:
            max_steps: ``trainer.max_steps``; ``None`` or -1 if training is not limited by steps.
        """
        checkpoint = self.checkpoint()
        step = checkpoint_step(checkpoint) if checkpoint else 0
        end = max_steps if max_steps and max_steps > 0 else None
        if checkpoint is None:
            start = "no checkpoint: starts at step 0"
        elif end is not None and step >= end:
            start = f"already finished at step {step}: raise trainer.max_steps to continue"
        else:
            start = f"from {checkpoint.name} (step {step}{f' of {end}' if end else ''})"
        print(f"resuming {self.experiment} / {self.name}: {start}", flush=True)

    def finish(
        self, metrics: Mapping[str, Any], ended_because: str | None = None, step: int | None = None
    ) -> list[Verdict]:
        """Records the final metrics and compares them with the ``expected:`` section of the config.

        Args:
            metrics: numbers or scalar tensors by name. A resumed run keeps earlier metrics that are not among these.
            ended_because: the reason why training ended, for the summary.
            step: the last optimizer step.
        """
        values = {**self.record["metrics"], **{name: float(value) for name, value in metrics.items()}}
        verdicts = judge(
            self.config.get("expected"), {name: value for name, value in values.items() if value is not None}
        )
        expected = [asdict(verdict) for verdict in verdicts]
        self._end("finished", metrics=values, expected=expected, ended_because=ended_because, step=step)
        return verdicts

    def metric(self, name: str | None) -> float | None:
        """Returns a final metric, the objective of a sweep; ``None`` for no name or a value that is not finite.

        Raises:
            ValueError: if the run has no such metric, unless it is the default of ``optimized_metric``.
        """
        metrics = self.record["metrics"]
        if name not in metrics and name not in (None, Config.optimized_metric):  # a run may have no validation
            raise ValueError(
                f"optimized_metric={name} is not a metric of the run {self.path}, which is complete otherwise. "
                f"{did_you_mean(str(name), metrics)}"
            )
        return metrics.get(name)

    def fail(self, error: BaseException) -> None:
        """Records that the run ended with ``error``: ``interrupted`` for Ctrl-C and signals, otherwise ``failed``."""
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        self._end("interrupted" if interrupted else "failed", error=f"{type(error).__name__}: {error}")

    def _end(self, status: str, **fields: Any) -> None:
        record = self.record
        wall_seconds = record["wall_seconds"] + time.time() - record["session_started"]
        skipped = _count_skipped(self.path / "skipped.csv")
        self.update(status=status, ended=_now(), wall_seconds=wall_seconds, skipped=skipped, **fields)

    def close(self, succeeded: bool) -> None:
        """Calls the functions of ``on_close``; an exception of one becomes a warning, because the run has ended."""
        for close in self.on_close:
            try:
                close(succeeded)
            except Exception as error:
                warnings.warn(f"a logger of {self.path} cannot be closed: {error}", stacklevel=2)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            try:
                if self.record["status"] == "running":
                    self.fail(error)
            except (OSError, ValueError) as second:  # the first error is the one to show
                warnings.warn(f"run.json does not record that the run failed: {second}", stacklevel=2)
        self.close(error is None)
        if self._lock is not None:
            self._lock.release()


def list_runs(folder: str | Path) -> list[Path]:
    """Returns the runs in an experiment's folder, ordered by start time, oldest first.

    A damaged ``run.json`` is named in a warning; its run is ordered by the time in the name of its folder.
    """
    runs = []
    for file in Path(folder).glob("*/run.json"):
        try:
            started = str(read_record(file.parent)["started"])
        except ValueError as error:
            warnings.warn(str(error), stacklevel=2)
            started = _started(file.parent.name)
        runs.append((started, file.parent))
    return [path for _, path in sorted(runs)]


def _started(name: str) -> str:
    """Returns the time in the name of a run folder, in the format of ``started``; other names are the oldest."""
    try:
        second = datetime.strptime(name[:19], "%Y-%m-%d_%H-%M-%S").replace(microsecond=999999)
        return second.astimezone().isoformat(timespec="microseconds")
    except ValueError:
        return ""


def parse_run(program: str, arguments: list[str]) -> RunFolder:
    """Opens the run named on the command line of ``<program> outputs/<experiment>[/<run>]``.

    Raises:
        SystemExit: for wrong arguments or a missing run; the message is printed.
    """
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("run", help="a run folder, or the folder of an experiment: its newest run")
    try:
        return RunFolder.open(parser.parse_args(arguments).run)
    except FileNotFoundError as error:
        parser.exit(1, f"Error: {error}\n")


def _find(folder: Path, run: str) -> Path:
    runs = list_runs(folder)
    path = runs[-1] if runs and run == "last" else folder / run
    if path not in runs:
        names = ", ".join(path.name for path in runs) or "none"
        raise FileNotFoundError(
            f"resume={run} is not a run of {folder}: use `last` for the newest, or one of: {names}."
        )
    return path


def saved_config(config: DictConfig) -> str:
    """Returns the text of ``config.yaml``: the config with the keys of a single call at their defaults."""
    saved = OmegaConf.merge(config, {key: value for key, value in MODE.items() if key in config})
    return OmegaConf.to_yaml(saved, resolve=True)


def _count_skipped(file: Path) -> int:
    """Counts the distinct files in a ``skipped.csv``; 0 if it does not exist."""
    if not file.is_file():
        return 0
    with file.open(newline="") as lines:
        return len({(row["root"], row["file"]) for row in csv.DictReader(lines)})


def _make_folder(experiment: Path) -> Path:
    """Creates a new folder named by the time; safe if several processes do so at once."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 1000):
        path = experiment / (stamp if attempt == 1 else f"{stamp}_{attempt}")
        with explained_errors(path):
            experiment.mkdir(parents=True, exist_ok=True)
            try:
                path.mkdir()
            except FileExistsError:
                continue
        return path
    raise FileExistsError(
        f"{experiment} already has 999 runs named {stamp}: start fewer runs per second, or clear the folder."
    )


def _last_modified(path: Path) -> float:
    return max(
        file.stat().st_mtime
        for file in (path / "run.json", path / "metrics.csv", *checkpoint_files(path / "checkpoints"))
        if file.exists()
    )


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="microseconds")
