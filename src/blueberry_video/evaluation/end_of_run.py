"""Evaluations that run once, after training, and the record of those that are done.

``end_of_run.json`` in the run folder contains the results for the final weights, so that a run that is killed in its
evaluations measures only what is missing when it is resumed.
"""

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer

from blueberry_video.atomic import write_text
from blueberry_video.parallel.fsdp import gathered

RECORD = "end_of_run.json"


def evaluate_at_end(trainer: Trainer, prefix: str, measure: Callable[[], dict[str, float]]) -> None:
    """Logs ``<prefix>/<name>`` of every value of ``measure()`` to all loggers and to ``trainer.callback_metrics``.

    The values are those of ``end_of_run.json``, without calling ``measure``, if it contains them. Only the first
    process measures; all processes must call.
    """
    with gathered(trainer.lightning_module):
        if trainer.is_global_zero:
            values = measured_once(trainer, prefix, measure)
            log_at_end(trainer, {f"{prefix}/{name}": value for name, value in values.items()})


def log_at_end(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Logs metrics of the final weights to all loggers and to ``trainer.callback_metrics``."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})


def measured_once(trainer: Trainer, name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Returns the recorded result ``name`` of the final weights, or calls ``measure`` and records its result."""
    results = recorded(trainer)
    if name not in results:
        results[name] = measure()
        if trainer.is_global_zero:
            text = json.dumps({"step": trainer.global_step, "results": results}, indent=2)
            write_text(Path(trainer.default_root_dir) / RECORD, f"{text}\n")
    return results[name]


def evaluate_sets(trainer: Trainer, task: LightningModule, data: Any) -> dict[str, float]:
    """Returns the metrics of the final weights on the validation set and, if there is one, on the test set of ``data``
    those of the weights with the best validation, if a callback has saved them as ``best_path(trainer)``."""
    metrics: dict[str, float] = {}
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    paths = (callback.best_path(trainer) for callback in callbacks if hasattr(callback, "best_path"))
    best = next(filter(None, paths), None)

    def evaluate(stage: str) -> dict[str, float]:
        weights = {"ckpt_path": best, "weights_only": True} if stage == "test" and best is not None else {}
        getattr(trainer, stage)(task, datamodule=data, verbose=False, **weights)
        return {name: float(value) for name, value in trainer.callback_metrics.items()}

    for stage in ("validate", "test") if data.test is not None else ("validate",):
        if f"trainer.{stage}" in recorded(trainer):  # by an earlier session of a resumed run
            log_at_end(trainer, recorded(trainer)[f"trainer.{stage}"])
        metrics |= measured_once(trainer, f"trainer.{stage}", partial(evaluate, stage))
    return metrics


def recorded(trainer: Trainer) -> dict[str, dict[str, float]]:
    """Returns the recorded results of the final weights by name; empty if there are none."""
    file = Path(trainer.default_root_dir) / RECORD
    if not file.is_file():
        return {}
    try:
        record: dict[str, Any] = json.loads(file.read_text())
        results = {name: dict(values) for name, values in record["results"].items()}
        return results if record["step"] == trainer.global_step else {}
    except (ValueError, KeyError, TypeError, AttributeError):
        warnings.warn(f"{file} is damaged: the evaluations at the end are repeated.", stacklevel=2)
        return {}
