"""Opening of a trained run: its data, and its task with the weights of the newest checkpoint."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from blueberry_video.config import load, repeat, resolve
from blueberry_video.experiment.best import best_checkpoint
from blueberry_video.experiment.checkpoint import (
    checkpoint_fault,
    checkpoint_files,
    consolidated,
    latest_good_checkpoint,
)
from blueberry_video.experiment.run_folder import RunFolder
from blueberry_video.installation import start_command
from blueberry_video.weights.files import read_content, without_compile


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A run that is opened for use.

    Attributes:
        path: run folder.
        config: resolved config, with the changes of sessions that resumed the run.
        record: the contents of ``run.json``.
        checkpoint: file of the weights.
        task: task in evaluation mode on its device, with the EMA weights if the run has them.
    """

    path: Path
    config: DictConfig
    record: dict[str, Any]
    checkpoint: Path
    task: Any

    @functools.cached_property
    def data(self) -> Any:
        """DataModule of the run, built on first use: its files may be on another machine."""
        return instantiate(self.config.data)


def load_trained(
    source: str | Path, kinds: Sequence[type] | None = None, device: torch.device | str = "cpu", best: bool = False
) -> TrainedRun:
    """Builds the task of a run, and loads its newest valid checkpoint, or that of its best validation.

    Args:
        source: a run folder, or the folder of an experiment's runs: the newest run.
        kinds: supported classes of tasks; ``None``: all.
        device: device of the task.
        best: use ``checkpoints/best.ckpt``.

    Raises:
        FileNotFoundError: if there is no run, or it has no valid checkpoint.
        ValueError: if the run is of a different kind, or its config or weights are not valid.
    """
    try:
        run = RunFolder.open(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} `{start_command('train', '<experiment>')}` creates one.") from error
    config, record = load(run.path / "config.yaml"), run.record
    resumes = record.get("resumes", ())
    if any(session.get("changed") for session in resumes):
        config = resolve(repeat(config, resumes))
    target = str(config.task._target_)
    if kinds is not None and not issubclass(get_class(target), tuple(kinds)):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{run.path} trained task._target_={target}, but this command requires a run of {names}.")
    try:
        checkpoint = best_checkpoint(run.path) if best else latest_good_checkpoint(run.path / "checkpoints")
        checkpoint = consolidated(checkpoint)
    except FileNotFoundError as error:
        if best:
            raise
        files = checkpoint_files(run.path / "checkpoints")
        faults = "; ".join(f"{file.name}: {checkpoint_fault(file)}" for file in files) or "there is no step_*.ckpt"
        raise FileNotFoundError(
            f"{run.path} has no valid checkpoint in checkpoints/ ({faults}): train first, with "
            f"`{start_command('train', run.experiment)}`."
        ) from error
    with torch.random.fork_rng(devices=()):  # the global generator does not change
        torch.default_generator.manual_seed(config.seed)  # as training: of parts without saved weights
        model = instantiate(config.model)
        optimization = instantiate(config.task.optimization)(
            optimizer=instantiate(config.optimizer), schedule=instantiate(config.schedule)
        )
        task = instantiate(config.task, _partial_=True)(model=model, optimization=optimization)
        if getattr(model, "lora", None) is not None and model.lora.base is not None:
            task.load_weights(model.lora.base)  # a checkpoint of adapters lacks the frozen weights
        _load(task, checkpoint)
    return TrainedRun(run.path, config, record, checkpoint, task.to(device).eval())


def _load(task: Any, checkpoint: Path) -> None:
    """Loads a checkpoint, in which EMA weights have the names of the trained ones."""
    content = read_content(checkpoint)
    state = content.get("state_dict", {}) if isinstance(content, dict) else {}
    state = {without_compile(name): value for name, value in state.items()}
    if state.keys() == task.state_dict().keys():
        task.load_state_dict(state)
    else:  # adapters, whose checkpoint lacks the frozen weights
        task.load_weights(checkpoint)
