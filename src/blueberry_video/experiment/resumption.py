"""Resumption of a run from a command line: the run, its config with the overrides, and what they change."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from omegaconf import DictConfig

from blueberry_video import config as configs
from blueberry_video.config import Change
from blueberry_video.experiment.record import read_record
from blueberry_video.experiment.run_folder import RunFolder, list_runs, saved_config
from blueberry_video.launch import scheduler


class CommandLine(Protocol):
    """Command line of a run: the file of an experiment, or the config saved by a run, and ``key=value`` words."""

    @property
    def file(self) -> Path: ...

    @property
    def overrides(self) -> Sequence[str]: ...


class Resumption(NamedTuple):
    """A run to train, checked.

    Attributes:
        run: its folder.
        config: its config; of a resumed run, with the overrides of the command line.
        changes: what the overrides change.
        complete: whether the run is finished and has no step left.
    """

    run: RunFolder
    config: DictConfig
    changes: list[Change]
    complete: bool


def begun(config: DictConfig, command: CommandLine | None) -> Resumption:
    """Creates the run folder, or begins a session in an existing one: of the run ``config.resume``, or, in a job that
    was requeued, of the run that the job started with the same config. A complete run stays as it is.

    Args:
        config: the experiment with the overrides.
        command: its command line; None for a point of a sweep.

    Raises:
        FileNotFoundError, BlockingIOError, ValueError: see :func:`resumption`.
    """
    if config.resume and command:
        found = resumption(config, command.file, command.overrides)
    elif name := run_of_job(config):
        run = RunFolder.find(config.name, name, config.output_dir)
        run.print_start(config.trainer.get("max_steps"))
        found = Resumption(run, run.config, [], run.is_complete(run.config))
    else:
        return Resumption(RunFolder.create(config, config.output_dir), config, [], False)
    if not found.complete:
        found.run.begin_session(found.changes)
    return found


def run_of_job(config: DictConfig) -> str | None:
    """Returns the name of the newest run with this config that the current job started before it was requeued."""
    job = scheduler.job()
    if job is None or job["restart"] == 0:
        return None
    text = saved_config(config)
    for path in reversed(list_runs(Path(config.output_dir) / config.name)):
        record, file = read_record(path), path / "config.yaml"
        if scheduler.is_continued(record.get("job"), job) and file.is_file() and file.read_text() == text:
            return path.name
    return None


def resumption(config: DictConfig, file: Path, overrides: Sequence[str], lock: bool = True) -> Resumption:
    """Opens the run ``config.resume`` and checks that it can continue with overrides; changes none of its files.

    Args:
        config: the experiment with the overrides.
        file: the file of the experiment, or the config saved by a run.
        overrides: the words of the command line.
        lock: lock the run; otherwise only check that no other process has locked it.

    Raises:
        FileNotFoundError, BlockingIOError: see :meth:`RunFolder.find`.
        ValueError: for an override that cannot be applied.
    """
    run = RunFolder.find(config.name, config.resume, config.output_dir, lock)
    defaults, has_weights = configs.defaults(file), run.checkpoint() is not None
    config, changes = configs.resumed(run.config, config, defaults, overrides, run.path, has_weights)
    run.print_start(config.trainer.get("max_steps"))
    complete = run.is_complete(config, changes)
    if not complete:
        run.check_changes(changes)
    return Resumption(run, config, changes, complete)
