"""Checkpoints with checksums: atomic writing, verification, and selection of the newest valid one.

A checkpoint is written to a temporary file, synced to disk, hashed and renamed; its SHA-256 is stored next to it in
``<name>.sha256``. So a file under its final name is complete, and one that was truncated or damaged later is detected
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

from blueberry_video.atomic import atomic_file
from blueberry_video.experiment.metrics_table import MetricsTable

SUFFIX = ".ckpt"
UNFINISHED = "unfinished-"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Trainer plugin that writes and reads checkpoint files: ``Trainer(plugins=[AtomicCheckpointIO()])``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        """Writes ``path`` and ``path.sha256``; ``path`` is replaced when both are complete and synced to disk."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # The digest is renamed first: a kill between the two renames invalidates an old file of this name, and never
        # validates a wrong one.
        with atomic_file(path) as data, atomic_file(_digest_file(path)) as digest:
            torch.save(checkpoint, data)
            data.flush()
            os.fsync(data.fileno())
            digest.write(f"{_sha256(Path(data.name))}\n".encode())

    def load_checkpoint(
        self, path: _PATH, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint after verifying its checksum; ``map_location`` defaults to the CPU.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if its contents do not match its checksum.
        """
        path = Path(path)
        if fault := checkpoint_fault(path):
            raise (ValueError if path.is_file() else FileNotFoundError)(
                f"checkpoint {path} cannot be loaded: {fault}. Use another file, or resume=last, which resumes the run "
                "from its newest valid checkpoint."
            )
        # The file is verified and was written by the run: it may contain objects that weights_only=True rejects.
        return torch.load(path, map_location=map_location or "cpu", weights_only=bool(weights_only))

    def remove_checkpoint(self, path: _PATH) -> None:
        Path(path).unlink(missing_ok=True)
        _digest_file(Path(path)).unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """Saves ``checkpoints/step_<step>.ckpt`` every ``every_n_steps`` optimizer steps and after the last step.

    Lightning's ``ModelCheckpoint`` saves before a validation that is due at the same batch, and a run resumed from that
    checkpoint skips the validation; it also never removes the file it was resumed from. This callback saves after the
    validation. The checkpoint of the last step gets its final name after the ``on_train_end`` hooks of all other
    callbacks. Lightning skips these hooks when it resumes at the last step, so a run killed in them resumes before that
    step and repeats them.

    Args:
        every_n_steps: optimizer steps between two checkpoints.
        keep: number of checkpoints to keep, newest first. With 2 or more, a valid one remains if the newest is damaged.

    Raises:
        ValueError: if ``every_n_steps`` or ``keep`` is below 1.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 2) -> None:
        if every_n_steps < 1 or keep < 1:
            raise ValueError(
                f"checkpoints.every_n_steps={every_n_steps} and checkpoints.keep={keep} must be at least 1."
            )
        self.every_n_steps = every_n_steps
        self.keep = keep
        self._saved_step = 0
        self._last: Path | None = None
        self._waits_for_validation = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop, epochs = trainer.fit_loop, trainer.fit_loop.epoch_progress
        if loop.restarted_mid_epoch and epochs.current.ready == epochs.current.completed:
            # Saved at the last batch of an epoch without a validation. Lightning counts that epoch as completed but
            # does not count the next one as started: a second resume would read the clips of a different epoch.
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
            # The last step that was logged when the checkpoint was saved: later steps are repeated.
            step = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
            MetricsTable(metrics).drop_after(step)

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.global_step == self._saved_step:  # this batch only accumulated gradients
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
            for temporary in folder.glob(".*.tmp"):  # left by a process that was killed
                temporary.unlink()


def _is_last_step(trainer: Trainer) -> bool:
    """Returns True after the last optimizer step of the training."""
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or bool(last_epoch and trainer.is_last_batch)


def checkpoint_files(folder: str | Path) -> list[Path]:
    """Returns the checkpoints ``step_*.ckpt`` in a folder, newest step first, valid or not."""
    return sorted(Path(folder).glob(f"step_*{SUFFIX}"), reverse=True)


def checkpoint_step(path: Path) -> int:
    """Returns the optimizer step at which ``step_<step>.ckpt`` was saved."""
    return int(path.stem.removeprefix("step_"))


def checkpoint_fault(path: str | Path) -> str | None:
    """Returns a description of what is wrong with a checkpoint file, or ``None`` if it matches its checksum."""
    path = Path(path)
    if not path.is_file():
        return "the file does not exist"
    if not _digest_file(path).is_file():
        return f"its checksum {_digest_file(path).name} is missing"
    if _sha256(path) != _digest_file(path).read_text().strip():
        return f"its contents ({path.stat().st_size} bytes) do not match its checksum: it was truncated or changed"
    return None


def latest_good_checkpoint(folder: str | Path) -> Path:
    """Returns the newest valid checkpoint in a folder; warns about every newer one that it skips.

    Raises:
        FileNotFoundError: if there is none, with the fault of each file.
    """
    faults: list[str] = []
    for path in checkpoint_files(folder):
        fault = checkpoint_fault(path)
        if fault is None:
            if faults:
                warnings.warn(
                    f"falling back to the previous valid checkpoint {path}: {'; '.join(faults)}.", stacklevel=2
                )
            return path
        faults.append(f"{path.name}: {fault}")
    found = "; ".join(faults) if faults else "it contains no step_*.ckpt"
    raise FileNotFoundError(
        f"{folder} has no valid checkpoint to resume from: {found}. Start a new run, without resume."
    )


def weights_file(source: str | Path) -> Path:
    """Resolves ``init_from``: a run folder becomes its newest valid checkpoint; a file, or a folder of published
    weights (``model_index.json`` or ``config.json``), is returned unchanged.

    Raises:
        FileNotFoundError: if the path does not exist or is a folder of neither kind.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(
            f"init_from={source} does not exist: use a run folder, such as outputs/videomae/<run>, or the path of a "
            "checkpoint or of published weights."
        )
    is_published = any(
        (source / name).is_file() for name in ("model_index.json", "config.json", "transformer/config.json")
    )
    if is_published or source.is_file():
        return source
    if not (source / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"init_from={source} is neither a run folder (checkpoints/) nor a folder of published weights (config.json "
            "or model_index.json): use one of these, or the path of a weight file."
        )
    return latest_good_checkpoint(source / "checkpoints")


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
