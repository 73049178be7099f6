"""Resumption of a run from a command line: the run, its config with the overrides, and what they change."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig

from blueberry_video import config as configs
from blueberry_video.config import Change
from blueberry_video.experiment.run_folder import RunFolder


class Resumption(NamedTuple):
    """Resumption of a run, checked and not yet begun.

    Attributes:
        run: its folder.
        config: its config with the overrides of the command line.
        changes: what the overrides change.
        complete: whether the run is finished and has no step left.
    """

    run: RunFolder
    config: DictConfig
    changes: list[Change]
    complete: bool


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
