"""Checkpoint of the best validation, beside the newest ones."""

import math
from pathlib import Path
from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from blueberry_video.experiment.checkpoint import SUFFIX, checkpoint_fault

BEST = f"best{SUFFIX}"


class BestCheckpoint(Callback):
    """Saves ``checkpoints/best.ckpt`` after each validation with the best value so far of a metric.

    If the data has a test set, the test at the end of the run uses these weights. A run is not resumed from this file:
    ``resume`` uses the newest checkpoint, which also contains the best value.

    Args:
        monitor: metric of validation, such as ``val/loss``; ``None`` saves nothing.
        mode: whether the best value is the lowest (``min``) or the highest (``max``).

    Attributes:
        value, step: the best value and its optimizer step; ``None`` before the first validation.

    Raises:
        ValueError: for another mode, or sharded checkpoints; after a validation that has no such metric.
    """

    def __init__(self, monitor: str | None = None, mode: Literal["min", "max"] = "min") -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"callbacks.best.mode={mode!r} must be 'min' or 'max'.")
        self.monitor, self.mode = monitor, mode
        self.value: float | None = None
        self.step: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step, "monitor": self.monitor, "mode": self.mode}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (state_dict["monitor"], state_dict["mode"]) == (self.monitor, self.mode):  # not changed by an override
            self.value, self.step = state_dict["value"], state_dict["step"]

    def best_path(self, trainer: Trainer) -> Path | None:
        """Returns the file of the best weights of a run; ``None`` if none is saved."""
        return None if self.step is None else best_checkpoint(trainer.default_root_dir)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is not None and getattr(trainer.strategy, "checkpoints", "full") == "sharded":
            raise ValueError(
                f"callbacks.best.monitor={self.monitor} saves whole checkpoints: set trainer.strategy.checkpoints=full."
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise ValueError(
                f"callbacks.best.monitor={self.monitor} is not a metric of validation: choose one of {known}."
            )
        value = float(trainer.callback_metrics[self.monitor])
        better = self.value is None or (value < self.value if self.mode == "min" else value > self.value)
        if math.isfinite(value) and better:
            self.value, self.step = value, trainer.global_step
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / BEST)


def best_checkpoint(run: str | Path) -> Path:
    """Returns ``checkpoints/best.ckpt`` of a run folder.

    Raises:
        FileNotFoundError: there is none, or it is damaged.
    """
    file = Path(run) / "checkpoints" / BEST
    if not file.exists() or (fault := checkpoint_fault(file)) is not None:
        reason = f"it is damaged ({fault})" if file.exists() else "there is none"
        raise FileNotFoundError(
            f"{file}: {reason}. A run saves it with callbacks.best.monitor=val/loss, or another metric of validation; "
            "without it, use the newest checkpoint."
        )
    return file
