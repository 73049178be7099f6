"""Logging of evaluations that run once, after training."""

import torch
from lightning import Trainer


def log_end_of_run(trainer: Trainer, prefix: str, values: dict[str, float]) -> None:
    """Logs ``<prefix>/<name>`` of every value to all loggers and to ``trainer.callback_metrics``."""
    metrics = {f"{prefix}/{name}": value for name, value in values.items()}
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
