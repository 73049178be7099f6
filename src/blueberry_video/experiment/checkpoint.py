"""Checkpoints that survive a kill at any moment, and finding the newest one that did.

A checkpoint is written to a temporary file, synced to disk, hashed and renamed; its SHA-256 lies beside it in
``<name>.sha256``. So a file under its final name is whole, and one that was truncated or damaged later is recognised
before it is loaded.
"""

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from blueberry_video.experiment.metrics_table import MetricsTable

SUFFIX = ".ckpt"
UNFINISHED = "unfinished-"


class AtomicCheckpointIO(TorchCheckpointIO):
    """How the trainer writes and reads checkpoint files: ``Trainer(plugins=[AtomicCheckpointIO()])``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        """Writes ``path`` and ``path.sha256``; until both are whole and on the disk, ``path`` stays what it was."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        data, digest = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.sha256.tmp")
        with data.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        with digest.open("w") as file:
            file.write(_sha256(data) + "\n")
            file.flush()
            os.fsync(file.fileno())
        # The digest first: a kill between the two makes an old file of this name refused, never a new one trusted.
        digest.replace(_digest_file(path))
        data.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def load_checkpoint(
        self, path: _PATH, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint, on the CPU unless ``map_location`` says otherwise.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if its contents are not those that were written.
        """
        path = Path(path)
        if fault := checkpoint_fault(path):
            raise (ValueError if path.is_file() else FileNotFoundError)(
                f"checkpoint {path} cannot be used: {fault}. Resume the run instead of the file (resume=last), "
                "which takes its newest good checkpoint, or name another file."
            )
        # The file is the run's own and verified; what it holds is more than the plain weights torch loads by default.
        return torch.load(path, map_location=map_location or "cpu", weights_only=bool(weights_only))

    def remove_checkpoint(self, path: _PATH) -> None:
        Path(path).unlink(missing_ok=True)
        _digest_file(Path(path)).unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """Saves ``checkpoints/step_<step>.ckpt`` every ``every_n_steps`` optimiser steps and at the last; keeps the newest.

    Lightning's ``ModelCheckpoint`` saves before a validation that is due at the same batch, and a run resumed from
    there never makes up for it; it also never removes the file it was resumed from. Here the save waits for that
    validation. And the last step's file gets its name only when the other callbacks are done with the end of training,
    which Lightning skips when it resumes at the last step: a run killed in its final evaluations repeats them.

    Args:
        every_n_steps: optimiser steps between two checkpoints.
        keep: how many to keep: 2 or more, so that a damaged newest one leaves a good one.

    Raises:
        ValueError: for a number below these bounds.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 2) -> None:
        if every_n_steps < 1 or keep < 1:
            raise ValueError(
                f"checkpoints.every_n_steps={every_n_steps} and checkpoints.keep={keep} must be 1 or more."
            )
        self.every_n_steps = every_n_steps
        self.keep = keep
        self._saved_step = 0
        self._last: Path | None = None
        self._waits_for_validation = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop, epochs = trainer.fit_loop, trainer.fit_loop.epoch_progress
        if loop.restarted_mid_epoch and epochs.current.ready == epochs.current.completed:
            # Saved at the last batch of an epoch without a validation there. Lightning counts that epoch as done, and
            # forgets to count the next one as begun: a second resume would show the clips of another epoch.
            epochs.increment_ready()
            epochs.increment_started()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._is_due(trainer):
            return
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if trainer.limit_val_batches and loop._should_check_val_fx(fetcher):
            self._waits_for_validation = True
        else:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._waits_for_validation:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._last is not None and trainer.is_global_zero:
            named = self._last.with_name(self._last.name.removeprefix(UNFINISHED))
            _digest_file(self._last).replace(_digest_file(named))
            self._last.replace(named)
            self._prune(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved_step = checkpoint["global_step"]
        metrics = Path(trainer.default_root_dir) / "metrics.csv"
        if trainer.state.fn == "fit" and trainer.is_global_zero and metrics.is_file():
            # The step that was logged last when the checkpoint was saved: the later ones are about to be run again.
            step = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
            MetricsTable(metrics).drop_after(step)

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.global_step == self._saved_step:  # of a batch that only accumulated gradients
            return False
        return _is_last_step(trainer) or trainer.global_step % self.every_n_steps == 0

    def _save(self, trainer: Trainer) -> None:
        self._waits_for_validation = False
        self._saved_step = trainer.global_step
        folder = Path(trainer.default_root_dir) / "checkpoints"
        path = folder / f"step_{trainer.global_step:08d}{SUFFIX}"
        if _is_last_step(trainer):
            path = self._last = path.with_name(f"{UNFINISHED}{path.name}")
        trainer.save_checkpoint(path, weights_only=False)
        self._prune(trainer)

    def _prune(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / "checkpoints"
            for old in checkpoint_files(folder)[self.keep :]:
                trainer.strategy.remove_checkpoint(old)
            for left_by_a_kill in folder.glob(".*.tmp"):
                left_by_a_kill.unlink()


def _is_last_step(trainer: Trainer) -> bool:
    """After a step: whether it was the last one of the training."""
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or bool(last_epoch and trainer.is_last_batch)


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The checkpoints ``step_*.ckpt`` in a folder, newest step first; good or not."""
    return sorted(Path(folder).glob(f"step_*{SUFFIX}"), reverse=True)


def checkpoint_step(path: Path) -> int:
    """The optimiser step at which ``step_<step>.ckpt`` was saved."""
    return int(path.stem.removeprefix("step_"))


def checkpoint_fault(path: str | Path) -> str | None:
    """What is wrong with a checkpoint file, ``None`` if its contents are those that were written."""
    path = Path(path)
    if not path.is_file():
        return "there is no such file"
    if not _digest_file(path).is_file():
        return f"its checksum {_digest_file(path).name} is missing"
    if _sha256(path) != _digest_file(path).read_text().strip():
        return f"its contents ({path.stat().st_size} bytes) do not match its checksum, so it was truncated or changed"
    return None


def latest_good_checkpoint(folder: str | Path) -> Path:
    """The newest checkpoint in a folder whose contents are whole; warns of every newer one that it passes over.

    Raises:
        FileNotFoundError: if there is none, saying what is wrong with each.
    """
    faults: list[str] = []
    for path in checkpoint_files(folder):
        fault = checkpoint_fault(path)
        if fault is None:
            if faults:
                warnings.warn(
                    f"falling back to the previous good checkpoint {path}: {'; '.join(faults)}.", stacklevel=2
                )
            return path
        faults.append(f"{path.name}: {fault}")
    found = "; ".join(faults) if faults else "it holds no step_*.ckpt"
    raise FileNotFoundError(
        f"{folder} has no good checkpoint to resume from: {found}. Train again from the start, without resume."
    )


def weights_file(source: str | Path) -> Path:
    """The file that ``init_from`` means: itself, or the newest good checkpoint of a run folder; a folder of published
    weights (``model_index.json`` or ``config.json``) is returned as it is.

    Raises:
        FileNotFoundError: if there is neither.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(
            f"init_from={source}: there is no such file or run folder. Give a run folder, such as "
            "outputs/videomae/<run>, or the path of a checkpoint or of published weights."
        )
    is_published = any(
        (source / name).is_file() for name in ("model_index.json", "config.json", "transformer/config.json")
    )
    if is_published or source.is_file():
        return source
    if not (source / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"init_from={source}: the folder holds neither a run (checkpoints/) nor published weights (config.json or "
            "model_index.json). Give one of these, or the path of a file of weights."
        )
    return latest_good_checkpoint(source / "checkpoints")


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
