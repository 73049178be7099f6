"""Loggers: ``metrics.csv`` (always used) and Weights & Biases (optional). Both continue the logs of a resumed run."""

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from omegaconf import OmegaConf
from wandb.sdk.lib.wbauth import read_netrc_auth

from blueberry_video.experiment.metrics_table import MetricsTable, read_steps
from blueberry_video.experiment.run_folder import RunFolder
from blueberry_video.launch.machine import WANDB_MODES, wandb_mode

FINISH_SECONDS = 600.0  # for the last uploads, after which the run ends without them


class MetricsCSV(Logger):
    """Logger that writes ``metrics.csv``, see :class:`~blueberry_video.experiment.metrics_table.MetricsTable`.

    On resume, ``Checkpoints`` drops the rows of later steps than the checkpoint's before the first call.

    Args:
        run: the run folder.
    """

    def __init__(self, run: RunFolder) -> None:
        super().__init__()
        self._run = run
        self._table: MetricsTable | None = None

    @property
    def name(self) -> str:
        return self._run.experiment

    @property
    def version(self) -> str:
        return self._run.name

    @property
    def save_dir(self) -> str:
        return str(self._run.path)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: ``config.yaml`` contains the hyper-parameters."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._table is None:
            self._table = MetricsTable(self._run.path / "metrics.csv")
        self._table.write(metrics, max(self._table.last_step, 0) if step is None else step)


def tolerated(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a method of :class:`Wandb`: an exception becomes a warning, once for each method."""

    @functools.wraps(method)
    def call(self: "Wandb", *arguments: Any, **options: Any) -> Any:
        if self.failed:
            return None
        try:
            return method(self, *arguments, **options)
        except Exception as error:  # of the network, the server, the disk or wandb itself: not of the run
            self.warn(method.__name__, error)
            return None

    return call


class Wandb(WandbLogger):
    """Weights & Biases logger: online if an API key is set, otherwise offline (for ``wandb sync`` or ``wandb leet``).

    Sends one row per step, when the next step begins. A resumed run keeps its id, so it is a single run on the server:
    steps that wandb already has are not sent again, and steps lost in a crash are sent from ``metrics.csv``.

    No error of wandb ends a run: it becomes a warning, and ``metrics.csv`` and the run folder contain all results.

    Args:
        run: the run folder; the experiment's name is the wandb group, the run's name the wandb name.
        project: the wandb project.
        entity: the wandb team or user; ``None`` is the default of the API key.
        tags: tags of the run.
        mode: ``online``, ``offline``, or ``auto``: ``WANDB_MODE`` or ``WANDB_DISABLED`` if set, otherwise online if
            there is a key in ``WANDB_API_KEY`` or in the netrc file.

    Raises:
        ValueError: for an invalid ``WANDB_MODE``.
    """

    def __init__(
        self,
        run: RunFolder,
        project: str = "blueberry-video",
        entity: str | None = None,
        tags: Sequence[str] = (),
        mode: Literal["auto", "online", "offline"] = "auto",
    ) -> None:
        self._run = run
        self._mode = environment_mode(mode)
        self._row: dict[str, Any] = {}
        self._row_step = -1
        self._sent_step = -1
        self._warned: set[str] = set()
        self.failed = False  # wandb does not start in any mode
        limits: dict[str, Any] = {"finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
        limits = {name: value for name, value in limits.items() if name in wandb.Settings.model_fields}
        run.on_close.append(self.close)
        super().__init__(
            name=run.name,
            version=run.record["wandb"]["id"],
            save_dir=run.path,
            project=project,
            entity=entity,
            group=run.experiment,
            tags=list(tags),
            mode=self._mode,
            config=OmegaConf.to_container(run.config, resolve=True),
            settings=wandb.Settings(silent=True, console="off", init_timeout=60, **limits),
        )
        del self._wandb_init["anonymous"]  # wandb warns of it

    @property
    def experiment(self) -> Any:
        """The wandb run; the first access starts it, or continues it in a resumed run."""
        starting = self._experiment is None and rank_zero_only.rank == 0  # type: ignore[attr-defined]
        if starting:
            self._sent_step = last_wandb_step(self._run.path / "wandb") if self._run.resumed else -1
        try:
            run = super().experiment
        except Exception as error:  # of the network, the server, the key, the settings or a file: not of the run
            run = self._without_server(error)
        if starting:
            self._start(run)
        return run

    def _without_server(self, error: Exception) -> Any:
        """Starts wandb offline, or, if that fails too, disabled, after a warning with the error."""
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        for mode, consequence in (
            ("offline", "the run is logged in its folder; upload it later with `wandb sync`"),
            ("disabled", "the run is logged in metrics.csv only"),
        ):
            if mode == self._mode:
                continue
            self._wandb_init["mode"] = self._mode = mode
            os.environ.pop("WANDB_MODE", None)  # otherwise it takes precedence in later calls
            wandb.teardown()  # the service may have failed itself
            try:
                run = super().experiment
            except Exception:  # the first error is the one to show
                continue
            rank_zero_warn(f"wandb cannot be used ({reason}): {consequence}.")
            return run
        self.failed = True
        raise error

    @rank_zero_only
    def warn(self, method: str, error: Exception) -> None:
        """Warns of an exception in a method, once."""
        if method in self._warned:
            return
        self._warned.add(method)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        rank_zero_warn(
            f"wandb failed in `{method}` ({reason}): the run continues, and {self._run.path} contains its results. "
            "Upload what is missing later with `wandb sync`, or use logger=csv."
        )

    @tolerated
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Adds metrics or media objects to the row of ``step``; ``None`` is the current row."""
        _ = self.experiment
        if step is None:
            started = self._row_step >= 0 or not self._run.resumed
            step = max(self._row_step, 0) if started else max(read_steps(self._run.path / "metrics.csv"), default=0)
        if self._run.resumed and self._row_step < 0:
            self._send_lost(step)
        if step > self._row_step:
            self._send()
            self._row_step = step
        self._row |= metrics

    @tolerated
    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Sends the last row. Lightning calls this after each fit and validation; :meth:`close` ends the wandb run."""
        if self._experiment is not None:
            self._send()

    def close(self, succeeded: bool) -> None:
        """Ends the wandb run, so that a new one can start in this process."""
        if (run := self._experiment) is None:
            return
        try:
            self.finalize("success" if succeeded else "failed")
            run.finish(exit_code=0 if succeeded else 1)
        except Exception as error:
            self.warn("finish", error)
            with contextlib.suppress(Exception):  # otherwise wandb tries again when the process exits
                wandb.teardown()
        finally:
            self._experiment = None

    def _start(self, run: Any) -> None:
        self._sent_step = max(self._sent_step, run.step - 1)
        self._run.update(
            wandb={
                "id": getattr(run, "id", None) or self._id,  # an agent of a sweep sets WANDB_RUN_ID
                "mode": self._mode,
                "url": run.url if self._mode == "online" else None,
                "folder": None if self._mode == "disabled" else self._folder(run),
            }
        )

    def _folder(self, run: Any) -> str:
        folder = Path(run.dir).parent  # one per process; their parent shows all of a resumed run
        return "wandb" if self._run.resumed else str(folder.relative_to(self._run.path))

    def _send_lost(self, step: int) -> None:
        """Sends the rows up to ``step`` that wandb may have lost, before the first metrics of a resumed run."""
        for earlier, row in read_steps(self._run.path / "metrics.csv").items():
            if earlier <= step:
                self._send()
                self._row, self._row_step = dict(row), earlier

    def _send(self) -> None:
        if self._row and self._row_step > self._sent_step:
            self.experiment.log({**self._row, "trainer/global_step": self._row_step}, step=self._row_step)
            self._sent_step = self._row_step
        self._row = {}


for _name in (*(name for name in vars(WandbLogger) if name.startswith("log_")), "watch", "after_save_checkpoint"):
    if _name not in vars(Wandb):
        setattr(Wandb, _name, tolerated(getattr(WandbLogger, _name)))


def environment_mode(mode: str) -> str:
    """Returns the wandb mode of a run, see :func:`~blueberry_video.launch.machine.wandb_mode`; makes no request.

    Raises:
        ValueError: for an invalid ``WANDB_MODE``.
    """
    if not os.environ.get("WANDB_MODE", "unset").strip():
        del os.environ["WANDB_MODE"]  # wandb rejects an empty value
    if (found := wandb_mode(mode, has_key=False)) is None:
        raise ValueError(
            f"WANDB_MODE={os.environ['WANDB_MODE']!r} is not a mode of wandb: use one of {', '.join(WANDB_MODES)}, or "
            "unset it."
        )
    if found == "offline" and mode == "auto" and "WANDB_MODE" not in os.environ:
        try:
            settings = wandb.setup().settings
        except Exception as error:  # pydantic's, of a variable
            reason = " ".join(str(error).split()[:40])
            raise ValueError(
                f"wandb rejects a WANDB_… variable of the environment: {reason}. Correct it, unset it, or use "
                "logger=csv."
            ) from error
        has_key = bool(settings.api_key) or bool(read_netrc_auth(host=settings.base_url))
        return "online" if has_key else "offline"
    return found


def last_wandb_step(folder: Path) -> int:
    """Returns the newest step in wandb's local files, also of a killed process; -1 if there is none."""
    for file in sorted(folder.glob("*run-*/*.wandb"), key=lambda file: file.stat().st_mtime, reverse=True):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(file)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        summary = json.loads(result.stdout) if result.returncode == 0 else {}
        if "_step" in summary.get("summary", {}):
            return int(summary["step"])
    return -1
