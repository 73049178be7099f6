"""Checkpoints with checksums: atomic writing, verification, and selection of the newest valid one.

A checkpoint is written to a temporary file, synced to disk, hashed and renamed; its SHA-256 is stored next to it in
``<name>.sha256``. So a file under its final name is complete, and one that was truncated or damaged later is detected
before it is loaded. A sharded checkpoint is a folder, see ``parallel/sharded_checkpoint.py``.
"""

import copy
import fcntl
import hashlib
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, Timer, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from omegaconf import OmegaConf

from blueberry_video.atomic import atomic_file, explained_errors
from blueberry_video.experiment.metrics_table import MetricsTable
from blueberry_video.experiment.record import read_record
from blueberry_video.parallel import sharded_checkpoint
from blueberry_video.parallel.sharded_checkpoint import has_shards, is_sharded, read_shards, remove_shards, shards_fault

SUFFIX = ".ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Trainer plugin that writes and reads checkpoint files: ``Trainer(plugins=[AtomicCheckpointIO()])``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        """Writes ``path`` and ``path.sha256``; ``path`` is replaced when both are complete and synced to disk.

        A checkpoint with sharded tensors, for which all processes must call, is written to a folder.
        """
        path = Path(path)
        if has_shards(checkpoint):
            sharded_checkpoint.write_shards(_plain(checkpoint), path)
            return
        needed = _size(checkpoint)
        with explained_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        # The digest is renamed first: a kill between the two renames invalidates an old file of this name, and never
        # validates a wrong one.
        with atomic_file(path, needed=needed) as data, atomic_file(_digest_file(path)) as digest:
            try:
                torch.save(_plain(checkpoint), data)
            except RuntimeError as error:  # PyTorch raises it when it closes its archive after a failed write
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
            data.flush()
            os.fsync(data.fileno())
            digest.write(f"{_sha256(Path(data.name))}\n".encode())

    def load_checkpoint(
        self, path: _PATH, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint after verifying its checksum; ``map_location`` defaults to the CPU, and is not used for a
        sharded one, of which the tensors are assembled.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if its contents do not match its checksum, or are not tensors and plain values.
        """
        path = Path(path)
        if fault := checkpoint_fault(path):
            raise (ValueError if path.exists() else FileNotFoundError)(
                f"checkpoint {path} cannot be loaded: {fault}. Use another file, or resume=last, which resumes the run "
                "from its newest valid checkpoint."
            )
        try:  # the checksum detects damage, not forgery: no file may execute code
            if is_sharded(path):
                return read_shards(path)
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"checkpoint {path} cannot be loaded: it contains objects other than tensors and plain values "
                f"({_first_sentence(error)}). If you trust its origin, load it with torch.load(…, weights_only=False) "
                "and save its state_dict for init_from."
            ) from error

    def remove_checkpoint(self, path: _PATH) -> None:
        if is_sharded(path):
            self.remove_checkpoint(_weights_of(Path(path)))
            remove_shards(Path(path))
            return
        Path(path).unlink(missing_ok=True)
        _digest_file(Path(path)).unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """Saves ``checkpoints/step_<step>.ckpt`` every ``every_n_steps`` optimizer steps and when training ends.

    Lightning's ``ModelCheckpoint`` saves before a validation that is due at the same batch, and a run resumed from that
    checkpoint skips the validation; it also never removes the file it was resumed from. This callback saves after the
    validation. The metrics of a step are logged before its checkpoint is saved, so that a kill in between loses none.

    The final checkpoint is saved before the evaluations at the end of training, for every end: the last step or epoch,
    or ``trainer.should_stop``. Lightning skips the ``on_train_end`` hooks of a run that resumes at its end; this
    callback makes it call them, so that a run killed in the evaluations repeats those that are missing.

    A signal that ends the run is delayed until the next optimizer step is complete and its checkpoint is saved, see
    ``launch/signals.py``. A validation is interrupted, and the resumed run begins with it again; where every rank must
    save a part of the state, as with sharding, the checkpoint is saved after the validation.

    Args:
        every_n_steps: optimizer steps between two checkpoints.
        keep: number of checkpoints to keep, newest first. With 2 or more, a valid one remains if the newest is damaged.

    Attributes:
        stopped: the reason if training ended before ``max_steps`` and ``max_epochs``, otherwise ``None``.
        signal_delay: delays signals while training, if they are handled.

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
        self.stopped: str | None = None
        self.signal_delay: Any = None  # launch.signals.Delay
        self._saved_step = 0
        self._ended = False  # the final checkpoint exists
        self._metrics: dict[str, float] = {}  # of the checkpoint from which the run resumes
        self._final: dict[str, Any] | None = None  # state of a final checkpoint from which the run resumes
        self._max_steps: int | None = None  # trainer.max_steps, while it is raised
        self._stop_later = False
        self._waits_for_validation = False
        self._interrupts_validation = False
        self._valid: dict[Path, tuple[int, int]] = {}  # file -> size and time when it was verified
        self._position: dict[str, Any] | None = None  # in the clips after the last batch of an epoch
        self._at_epoch_end = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved_step = checkpoint["global_step"]
        if trainer.state.fn != "fit":
            return
        self._metrics, self._final = checkpoint.get("metrics", {}), checkpoint.get("final", {})
        metrics = Path(trainer.default_root_dir) / "metrics.csv"
        if trainer.is_global_zero and metrics.is_file():
            # The last step that was logged when the checkpoint was saved: later steps are repeated.
            step = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
            MetricsTable(metrics).drop_after(step)
        if 0 < trainer.max_steps <= self._saved_step:  # otherwise Lightning skips on_train_start and on_train_end
            self._max_steps, trainer.fit_loop.epoch_loop.max_steps = trainer.max_steps, self._saved_step + 1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.should_stop:  # for example after trainer.max_time; Lightning would skip the hooks likewise
            self._stop_later, trainer.should_stop = True, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop, epochs = trainer.fit_loop, trainer.fit_loop.epoch_progress
        if loop.restarted_mid_epoch and epochs.current.ready == epochs.current.completed:
            # Saved at the last batch of an epoch without a validation. Lightning counts that epoch as completed but
            # does not count the next one as started: a second resume would read the clips of a different epoch.
            epochs.increment_ready()
            epochs.increment_started()
        if self._max_steps is not None and not (loop.restarting and loop.epoch_loop.val_loop.restarted_mid_evaluation):
            loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None
        if self._final is not None:
            _apply_optimizer_settings(trainer, pl_module)
        trainer.should_stop, self._stop_later = self._stop_later, False
        if self.signal_delay is not None and not loop.done:
            self.signal_delay.begin()
        if self._final is None:
            return
        values = self._metrics.items()
        trainer.callback_metrics.update({name: torch.tensor(value, dtype=torch.float64) for name, value in values})
        if not loop.done and trainer.max_epochs is not None and 0 < trainer.max_epochs <= self._final.get("epochs", 0):
            epochs.increment_processed()
        stopped = self._final.get("stopped")
        if stopped and not _was_finished(Path(trainer.default_root_dir)):  # it ended in the evaluations that remain
            trainer.should_stop, self.stopped = True, stopped
        if loop.done:
            self._ended = True
            loop.epoch_loop._batches_that_stepped = trainer.global_step
            epochs.current.completed = self._final.get("epoch", epochs.current.completed)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop_at_optimizer_step(trainer)
        self._position = _position(trainer) if trainer.is_last_batch else None
        ends = self._is_interrupted(trainer)
        if not self._is_due(trainer) and not ends:
            return
        if _validation_is_scheduled(trainer):
            self._waits_for_validation = True
            return
        trainer._logger_connector.update_train_step_metrics()
        self._save(trainer, leave=ends)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or self._ended or self.signal_delay is None:
            return
        is_replicated = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if not self.signal_delay.received or not is_replicated or trainer.fit_loop._should_accumulate():
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):  # validation uses the averaged weights
                callback.on_validation_epoch_end(trainer, pl_module)
        self._interrupts_validation = True
        self.signal_delay.end()
        # without the barrier of save_checkpoint: the ranks do not interrupt the validation at the same batch
        content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        trainer.strategy.save_checkpoint(content, self._path(trainer))
        self._prune(trainer)
        self.signal_delay.leave()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self._max_steps is not None:  # the run resumed in the validation after its last step
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None
        self._stop_at_optimizer_step(trainer)
        self._position = _position(trainer) if trainer.is_last_batch else None
        ends = self._is_interrupted(trainer)
        if self._waits_for_validation or (_stops_early(trainer) and not self._ended) or ends:
            self._save(trainer, leave=ends)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _stops_early(trainer) and not self._ended:  # EarlyStopping after an epoch
            self._at_epoch_end = True
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.signal_delay is not None:
            self.signal_delay.end()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._saved_step:
            self._save(trainer, final=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # of the last validation or check, which a resumed run does not repeat before its end
        checkpoint["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self._ended:
            epochs = trainer.current_epoch + 1 if trainer.is_last_batch else 0
            epoch = trainer.fit_loop.epoch_progress.current.ready  # trainer.current_epoch when training has ended
            checkpoint["final"] = {"stopped": self.stopped, "epochs": epochs, "epoch": epoch}
        if self._at_epoch_end and self._position is not None:  # from here, Lightning would resume one epoch later
            checkpoint["loops"]["fit_loop"] = self._position
        if self._interrupts_validation:  # Lightning then begins with the validation, here with its first batch
            started = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            none = dict.fromkeys(started, 0)
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            progress.update(total=started, current=none, is_last_batch=False)

    def _is_interrupted(self, trainer: Trainer) -> bool:
        """Returns whether a signal ends the run at this optimizer step, on all ranks."""
        if self.signal_delay is None or self._ended or trainer.fit_loop._should_accumulate():
            return False
        received = self.signal_delay.received
        return trainer.strategy.reduce_boolean_decision(received, all=False) if trainer.world_size > 1 else received

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.global_step == self._saved_step:  # this batch only accumulated gradients
            return False
        return _is_last_step(trainer) or _stops_early(trainer) or trainer.global_step % self.every_n_steps == 0

    def _stop_at_optimizer_step(self, trainer: Trainer) -> None:
        """Delays ``trainer.should_stop`` while gradients are accumulated, which a checkpoint does not contain."""
        if trainer.fit_loop._should_accumulate():
            self._stop_later |= trainer.should_stop
            trainer.should_stop = False
        elif self._stop_later:
            self._stop_later, trainer.should_stop = False, True

    def _save(self, trainer: Trainer, final: bool = False, leave: bool = False) -> None:
        if leave:
            self.signal_delay.end()
        self._waits_for_validation = False
        self._saved_step = trainer.global_step
        folder = Path(trainer.default_root_dir) / "checkpoints"
        final |= _is_last_step(trainer) or _stops_early(trainer)
        if final:
            self.stopped = None if _is_last_step(trainer) else _stop_reason(trainer)
            self._ended = True
            if trainer.is_global_zero:  # results of other weights; evaluation/end_of_run.py writes this file
                folder.with_name("end_of_run.json").unlink(missing_ok=True)
        trainer.save_checkpoint(self._path(trainer), weights_only=False)
        self._prune(trainer)
        if final and self.signal_delay is not None:  # a signal ends the evaluations that follow
            self.signal_delay.end()
            leave |= self.signal_delay.received
        if leave:
            self.signal_delay.leave()

    def _path(self, trainer: Trainer) -> Path:
        suffix = sharded_checkpoint.SUFFIX if _writes_shards(trainer) else SUFFIX
        return Path(trainer.default_root_dir) / "checkpoints" / f"step_{trainer.global_step:08d}{suffix}"

    def _prune(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / "checkpoints"
            files = checkpoint_files(folder)
            damaged = [file for file in files if self._is_damaged(file)] if len(files) > self.keep else []
            if damaged:
                names = ", ".join(file.name for file in damaged)
                warnings.warn(f"{folder}: the damaged checkpoints {names} are removed.", stacklevel=2)
            for old in [*damaged, *[file for file in files if file not in damaged][self.keep :]]:
                trainer.strategy.remove_checkpoint(old)
            for temporary in folder.glob(".*.tmp"):  # left by a process that was killed
                shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()

    def _is_damaged(self, file: Path) -> bool:
        """Verifies a checkpoint; again only if the file has changed, because hashing reads all of it."""
        state = file.stat().st_size, file.stat().st_mtime_ns  # of a folder: when a file was added or removed
        if self._valid.get(file) != state:
            if checkpoint_fault(file) is not None:
                return True
            self._valid[file] = state
        return False


def _apply_optimizer_settings(trainer: Trainer, task: LightningModule) -> None:
    """Sets learning rate, weight decay and other settings of the restored optimizer and scheduler to those of the
    config, which overrides may have changed. Without overrides, all values stay the same."""
    settings: Any = task.configure_optimizers()
    [optimizer], [schedule] = trainer.optimizers, trainer.lr_scheduler_configs
    new = settings["optimizer"].param_groups
    scheduler: Any = schedule.scheduler
    scheduler.base_lrs = [group["initial_lr"] for group in new]
    for group, values, multiplier in zip(optimizer.param_groups, new, scheduler.lr_lambdas, strict=True):
        group.update({name: value for name, value in values.items() if name != "params"})
        group["lr"] = group["initial_lr"] * multiplier(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def why_training_ended(trainer: Trainer) -> str:
    """Returns the limit that training reached, or the step and the reason of an early stop."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    callback = next((callback for callback in callbacks if isinstance(callback, Checkpoints)), None)
    stopped = callback.stopped if callback is not None else None
    epochs = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    if stopped is None and 0 < trainer.max_steps <= trainer.global_step:
        return f"trainer.max_steps={trainer.max_steps} reached"
    if stopped is None and trainer.max_epochs is not None and 0 < trainer.max_epochs <= epochs:
        return f"trainer.max_epochs={trainer.max_epochs} reached"
    end = f" of {trainer.max_steps}" if trainer.max_steps > 0 else ""
    return f"stopped early at step {trainer.global_step}{end}: {stopped or _stop_reason(trainer)}"


def _stop_reason(trainer: Trainer) -> str:
    """Returns the reason of ``trainer.should_stop``; a callback gives its own as the attribute ``stop_reason``."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None and left <= 0:
            return "trainer.max_time has passed"
        if reason := getattr(callback, "stop_reason", None):
            return str(reason)
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            return f"EarlyStopping: {callback.stopping_reason_message.rstrip('.')}"
    return "a callback set trainer.should_stop"


def _was_finished(run: Path) -> bool:
    """Returns whether the run was finished when it was resumed."""
    resumes = read_record(run).get("resumes", []) if (run / "run.json").is_file() else []
    return bool(resumes) and resumes[-1]["previous_status"] == "finished"


def _position(trainer: Trainer) -> dict[str, Any]:
    return copy.deepcopy(trainer.fit_loop.state_dict())


def _validation_is_scheduled(trainer: Trainer) -> bool:
    """Returns whether a validation follows this batch, other than the one that ``trainer.should_stop`` causes.

    The latter is no part of a run that continues from the checkpoint.
    """
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    stop, trainer.should_stop = trainer.should_stop, False
    scheduled = trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
    trainer.should_stop = stop
    return bool(trainer.limit_val_batches and scheduled)


def _stops_early(trainer: Trainer) -> bool:
    return trainer.should_stop and trainer.fit_loop._can_stop_early


def _is_last_step(trainer: Trainer) -> bool:
    """Returns True after the last optimizer step of the training."""
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or bool(last_epoch and trainer.is_last_batch)


def _writes_shards(trainer: Trainer) -> bool:
    return getattr(trainer.strategy, "checkpoints", "full") == "sharded"


def checkpoint_files(folder: str | Path) -> list[Path]:
    """Returns the checkpoints ``step_<step>.ckpt`` and ``.shards`` in a folder, newest step first, valid or not."""
    files = [
        file
        for suffix in (SUFFIX, sharded_checkpoint.SUFFIX)
        for file in Path(folder).glob(f"step_*{suffix}")
        if file.stem.removeprefix("step_").isdecimal()
    ]
    return sorted(files, key=checkpoint_step, reverse=True)


def checkpoint_step(path: Path) -> int:
    """Returns the optimizer step at which ``step_<step>.ckpt`` or ``.shards`` was saved."""
    return int(path.stem.removeprefix("step_"))


def checkpoint_fault(path: str | Path) -> str | None:
    """Returns a description of what is wrong with a checkpoint, or ``None`` if it matches its checksum."""
    path = Path(path)
    if is_sharded(path):
        return shards_fault(path)
    if not path.is_file():
        return "the file does not exist"
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "it is empty (0 bytes)"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, a text in place of the file: run `git lfs pull`"
    if not _digest_file(path).is_file():
        return f"its checksum {_digest_file(path).name} is missing"
    if _sha256(path) != _digest_file(path).read_text(errors="replace").strip():
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


def check_accumulation(path: Path, batches: int) -> None:
    """Checks that a run can continue from a checkpoint with a different ``trainer.accumulate_grad_batches``.

    Gradients are accumulated up to each multiple of it in an epoch: from another position, the first step would have
    fewer batches than it is divided by.

    Raises:
        ValueError: if the position in the epoch is no multiple of ``batches``; the message names the numbers that fit.
    """
    whole = not is_sharded(path)
    content = (
        torch.load(path, map_location="cpu", weights_only=True, mmap=True) if whole else read_shards(path, only="loops")
    )
    progress = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    position = progress["current"]["processed"]
    if position % batches and not progress["is_last_batch"]:
        fitting = ", ".join(str(number) for number in range(1, position + 1) if position % number == 0)
        raise ValueError(
            f"trainer.accumulate_grad_batches={batches} cannot be applied from {path.name}, which was saved after "
            f"{position} batches of an epoch: its first step would accumulate {batches - position % batches} batches. "
            f"Use a divisor of {position} ({fitting}), or leave the override out."
        )


def weights_file(source: str | Path) -> Path:
    """Resolves ``init_from``: a run folder becomes its newest valid checkpoint, and a sharded one a file of its
    weights; a file, or a folder of published weights (``model_index.json`` or ``config.json``), is returned unchanged.

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
    if is_sharded(source):
        return consolidated(source)
    if is_published or source.is_file():
        return source
    if not (source / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"init_from={source} is neither a run folder (checkpoints/) nor a folder of published weights (config.json "
            "or model_index.json): use one of these, or the path of a weight file."
        )
    return consolidated(latest_good_checkpoint(source / "checkpoints"))


def consolidated(path: Path) -> Path:
    """Returns one file with the weights of a sharded checkpoint, ``weights_<step>.ckpt`` next to it, which is written
    once; a checkpoint that is a file is returned unchanged.

    Raises:
        OSError: if it cannot be written.
    """
    if not is_sharded(path):
        return path
    file = _weights_of(path)
    with explained_errors(file), (path.parent / ".consolidate.lock").open("wb") as lock:  # the ranks of a run wait
        fcntl.lockf(lock, fcntl.LOCK_EX)
        if checkpoint_fault(file) is not None:
            AtomicCheckpointIO().save_checkpoint(read_shards(path, only="state_dict"), file)
    return file


def _weights_of(path: Path) -> Path:
    return path.with_name(f"weights_{checkpoint_step(path):08d}{SUFFIX}")


def _plain(value: Any) -> Any:
    """Converts NumPy scalars, configs and paths, which ``torch.load(weights_only=True)`` rejects, to plain values."""
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if type(value) in (dict, list, tuple):
        items = value.values() if isinstance(value, dict) else value
        plain = [_plain(item) for item in items]
        return dict(zip(value, plain, strict=True)) if isinstance(value, dict) else type(value)(plain)
    return value


def _size(value: Any) -> int:
    """Returns the bytes of all tensors in nested containers; tensors that share memory are counted once."""
    storages: dict[int, int] = {}

    def add(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, Mapping):
            add(list(item.values()))
        elif isinstance(item, list | tuple):
            for part in item:
                add(part)

    add(value)
    return sum(storages.values())


def _first_sentence(error: BaseException) -> str:
    found = re.search(r"Unsupported (?:global|class|operand)[^.\n]*\S*|Trying to load[^\n]*", str(error))
    return found[0] if found else str(error).partition("\n")[0]


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
