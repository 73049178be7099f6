"""The folder of a run: its resolved config, its record, and finding it again to resume, report or judge it.

``outputs/<experiment>/<run>/`` holds ``config.yaml`` (training on it repeats the run), ``run.json`` (what ran, where,
and what came out), ``metrics.csv``, ``checkpoints/``, ``media/``, ``wandb/`` and ``report.html``. All JSON is written
atomically.
"""

import csv
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from blueberry_video.config import Config, did_you_mean
from blueberry_video.experiment.checkpoint import checkpoint_files, checkpoint_step, latest_good_checkpoint
from blueberry_video.experiment.expected import Verdict, judge
from blueberry_video.experiment.provenance import git_state, hardware, versions

MODE = {"resume": None, "check": False, "enforce_expected": False}
"""Keys of a config that say what one call is to do; a later one must not inherit them."""


class RunFolder:
    """A run's folder. As a context manager it records how the run ended::

        with RunFolder.create(config) as run:
            trainer.fit(task, data, ckpt_path=run.checkpoint())
            verdicts = run.finish(metrics)

    Leaving by an exception writes ``failed`` (or ``interrupted``) to ``run.json``; a killed process leaves
    ``running``. Only rank 0 writes.

    Attributes:
        path: the folder, absolute; callbacks find it as ``trainer.default_root_dir``.
        resumed: whether the run trains on from a checkpoint.
        on_close: called with whether the block was left without an exception, in order to end what belongs to the run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.resumed = False
        self.on_close: list[Callable[[bool], None]] = []

    @classmethod
    def create(cls, config: DictConfig, root: str | Path = "outputs") -> Self:
        """Makes ``<root>/<config.name>/<date_time>/`` with ``config.yaml`` and ``run.json``.

        Args:
            config: the composed config; ``name`` and ``seed`` are read, and ``expected`` at the end. What it says of
                this one call (``resume``, ``check``, ``enforce_expected``) is not saved.
            root: folder of all runs.

        Raises:
            ValueError: if the config has no ``name``.
        """
        experiment = config.get("name")
        if not experiment:
            raise ValueError(
                "the config has no `name`: give the experiment one, `name: my_idea`; its runs go to outputs/my_idea/."
            )
        run = cls(_make_folder(Path(root) / experiment))
        _write_text(run.path / "config.yaml", OmegaConf.to_yaml(_without_mode(config), resolve=True))
        _write_json(
            run.path / "run.json",
            {
                "experiment": experiment,
                "run": run.name,
                "status": "running",
                "started": _now(),
                "ended": None,
                "wall_seconds": 0.0,
                "session_started": time.time(),
                "seed": config.get("seed"),
                **git_state(),
                "versions": versions(),
                "hardware": hardware(),
                "wandb": {"id": secrets.token_hex(4), "url": None},
                "resumes": [],
                "metrics": {},
                "expected": [],
                "skipped": 0,
                "error": None,
            },
        )
        return run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """An existing run, from its folder or, its newest run, from the experiment's folder.

        Raises:
            FileNotFoundError: if neither holds a ``run.json``.
        """
        path = Path(path)
        if (path / "run.json").is_file():
            return cls(path)
        runs = list_runs(path)
        if not runs:
            raise FileNotFoundError(
                f"{path} holds no run (a folder with a run.json): give outputs/<experiment>[/<run>]."
            )
        return cls(runs[-1])

    @classmethod
    def resume(cls, experiment: str, run: str, root: str | Path = "outputs") -> Self:
        """Opens a run in order to train it on, and records that.

        It goes on from its newest good checkpoint. A run that was killed before its first one starts again in its
        folder, without the rows that its ``metrics.csv`` had.

        Args:
            experiment: the experiment's name.
            run: a run's name, or ``last`` for the newest run of the experiment.
            root: folder of all runs.

        Raises:
            FileNotFoundError: for an unknown run, naming those that exist; for one whose checkpoints are all bad, and
                for a finished one that kept none. The run stays as it was.
        """
        found = cls(_find(Path(root) / experiment, run))
        found.resumed = True
        record = found.record
        checkpoint = found.checkpoint()
        if checkpoint is None and record["status"] == "finished":
            raise FileNotFoundError(
                f"resume={run}: the run {found.path} is finished and has no checkpoint to train on from. Train again "
                "without resume."
            )
        if record["status"] == "running":  # it was killed: the last thing it wrote tells how long it had run
            record["wall_seconds"] += max(_last_sign_of_life(found.path) - record["session_started"], 0.0)
        if checkpoint is None:
            _remove(found.path / "metrics.csv")
        git = git_state()
        record["resumes"].append(
            {"time": _now(), "previous_status": record["status"], "commit": git["commit"], "dirty": git["dirty"]}
        )
        found.update(
            status="running",
            ended=None,
            error=None,
            session_started=time.time(),
            resumes=record["resumes"],
            wall_seconds=record["wall_seconds"],
        )
        return found

    @property
    def name(self) -> str:
        """The run's name: its folder's."""
        return self.path.name

    @property
    def experiment(self) -> str:
        """The experiment's name: that of the folder above."""
        return self.path.parent.name

    @property
    def config(self) -> DictConfig:
        """The run's resolved config."""
        config = OmegaConf.load(self.path / "config.yaml")
        if not isinstance(config, DictConfig):
            raise ValueError(
                f"{self.path / 'config.yaml'} is not a mapping of keys: restore the file that the run wrote."
            )
        return config

    @property
    def record(self) -> dict[str, Any]:
        """The contents of ``run.json``."""
        return json.loads((self.path / "run.json").read_text())

    def update(self, **fields: Any) -> None:
        """Replaces fields of ``run.json``."""
        _write_json(self.path / "run.json", {**self.record, **fields})

    def checkpoint(self) -> Path | None:
        """Where to train on from: a resumed run's newest good checkpoint, ``None`` for a run that starts.

        Raises:
            FileNotFoundError: if a resumed run has checkpoints and none can be read.
        """
        folder = self.path / "checkpoints"
        return latest_good_checkpoint(folder) if self.resumed and checkpoint_files(folder) else None

    @rank_zero_only
    def print_start(self, max_steps: int | None) -> None:
        """Prints from where a resumed run goes on.

        Args:
            max_steps: the optimiser step at which it is to end; ``None`` or -1 where something else ends it.
        """
        checkpoint = self.checkpoint()
        step = checkpoint_step(checkpoint) if checkpoint else 0
        end = max_steps if max_steps and max_steps > 0 else None
        if checkpoint is None:
            start = "no checkpoint yet: from the start"
        elif end is not None and step >= end:
            start = f"already finished at step {step}: raise trainer.max_steps to train on"
        else:
            start = f"from {checkpoint.name} (step {step}{f' of {end}' if end else ''})"
        print(f"resuming {self.experiment} / {self.name}: {start}", flush=True)

    def finish(self, metrics: Mapping[str, Any]) -> list[Verdict]:
        """Records the final metrics and judges them by the config's ``expected:``.

        Args:
            metrics: numbers or scalar tensors by name. A resumed run keeps those it had and that are not among these.
        """
        values = {**self.record["metrics"], **{name: float(value) for name, value in metrics.items()}}
        verdicts = judge(
            self.config.get("expected"), {name: value for name, value in values.items() if value is not None}
        )
        self._end("finished", metrics=values, expected=[asdict(verdict) for verdict in verdicts])
        return verdicts

    def metric(self, name: str | None) -> float | None:
        """A final metric, as a sweep optimises it; ``None`` for no name, and for a value that is not finite.

        Raises:
            ValueError: if the run reported no such metric, unless it is the one that nobody chose.
        """
        metrics = self.record["metrics"]
        if name not in metrics and name not in (None, Config.optimized_metric):  # a run may do without validation
            raise ValueError(
                f"`optimized_metric` = {name} is nothing that the run {self.path} reported; all else of it is "
                f"complete. {did_you_mean(str(name), metrics)}"
            )
        return metrics.get(name)

    def fail(self, error: BaseException) -> None:
        """Records that the run ended by ``error``: ``interrupted`` for Ctrl-C and signals, else ``failed``."""
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        self._end("interrupted" if interrupted else "failed", error=f"{type(error).__name__}: {error}")

    def _end(self, status: str, **fields: Any) -> None:
        record = self.record
        wall_seconds = record["wall_seconds"] + time.time() - record["session_started"]
        skipped = _count_skipped(self.path / "skipped.csv")
        self.update(status=status, ended=_now(), wall_seconds=wall_seconds, skipped=skipped, **fields)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.record["status"] == "running":
            self.fail(error)
        for close in self.on_close:
            close(error is None)


def list_runs(folder: str | Path) -> list[Path]:
    """The runs in an experiment's folder, oldest first by the time they were started."""
    records = [(json.loads(file.read_text())["started"], file.parent) for file in Path(folder).glob("*/run.json")]
    return [path for _, path in sorted(records)]


def _find(folder: Path, run: str) -> Path:
    runs = list_runs(folder)
    path = runs[-1] if runs and run == "last" else folder / run
    if path not in runs:
        names = ", ".join(path.name for path in runs) or "none"
        raise FileNotFoundError(
            f"resume={run}: {folder} has no such run. Runs there: {names}; `last` takes the newest."
        )
    return path


def _without_mode(config: DictConfig) -> DictConfig:
    """What describes the run, without what was asked of the one call that made it."""
    return OmegaConf.merge(config, {key: value for key, value in MODE.items() if key in config})  # type: ignore[return-value]


def _count_skipped(file: Path) -> int:
    """Distinct files in a ``skipped.csv``; 0 where there is none."""
    if not file.is_file():
        return 0
    with file.open(newline="") as lines:
        return len({(row["root"], row["file"]) for row in csv.DictReader(lines)})


def _make_folder(experiment: Path) -> Path:
    """A folder named by the time, that no other process has."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 1000):
        path = experiment / (stamp if attempt == 1 else f"{stamp}_{attempt}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise FileExistsError(
        f"{experiment} already has 999 runs named {stamp}: start runs less often than that, or clear the folder."
    )


def _last_sign_of_life(path: Path) -> float:
    return max(
        file.stat().st_mtime
        for file in (path / "run.json", path / "metrics.csv", *checkpoint_files(path / "checkpoints"))
        if file.exists()
    )


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="microseconds")


@rank_zero_only
def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


@rank_zero_only
def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write_text(path, json.dumps(_with_null(value), indent=2, allow_nan=False) + "\n")


def _with_null(value: Any) -> Any:
    """The same with ``None`` for what is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _with_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@rank_zero_only
def _write_text(path: Path, text: str) -> None:
    """Writes the whole file or, if killed, nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
