"""Control of reconstructed moving scenes: a model without motion, trained equally."""

import copy
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import default_collate

from blueberry_video.evaluation.end_of_run import evaluate_at_end
from blueberry_video.evaluation.metrics import Means


class StaticControl(Callback):
    """Trains a static model at the end of the run and compares it with the final model, on the validation set.

    It has the initial Gaussians, settings, number of steps and views per step of the run. Logs ``<name>/psnr`` of the
    final model, ``<name>/psnr_static``, ``<name>/psnr_static_gain``, the difference in dB, and
    ``<name>/num_gaussians_static``.

    Args:
        name: prefix of the metrics.
        seed: seed of the order of the views and of new Gaussians.
    """

    def __init__(self, name: str = "control", seed: int = 0):
        self.name, self.seed = name, seed
        self.untrained: Any = None  # model with the initial Gaussians

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copies the initial model, before a checkpoint is loaded."""
        if stage == "fit" and self.untrained is None:
            if not hasattr(pl_module, "static_control"):
                raise ValueError(
                    f"callbacks.{self.name} requires task=splatting, but task._target_ is {type(pl_module).__name__}: "
                    f"set callbacks.{self.name}=null."
                )
            self.untrained = copy.deepcopy(pl_module.model).cpu()  # type: ignore[union-attr, operator]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        evaluate_at_end(trainer, self.name, lambda: self.measure(trainer, pl_module))

    def measure(self, trainer: Trainer, task: Any) -> dict[str, float]:
        """Returns the metrics without their prefix."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        control = self.train(task, data.train, data.batch_size, trainer.global_step)
        found = {"psnr": mean_psnr(task, data.val), "psnr_static": mean_psnr(control, data.val)}
        found["psnr_static_gain"] = found["psnr"] - found["psnr_static"]
        found["num_gaussians_static"] = float(control.model.number)
        return found

    def train(self, task: Any, views: Any, batch_size: int, steps: int) -> Any:
        """Returns the task of a static model after ``steps`` optimizer steps on ``views``."""
        control = task.static_control(copy.deepcopy(self.untrained)).to(task.device, task.dtype)
        control.prepare(views)
        control.to(task.device, task.dtype).train()
        optimizer, scheduler = control.build_optimizer(steps)
        generator, order = torch.Generator().manual_seed(self.seed), torch.empty(0, dtype=torch.long)
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(self.seed)
            for _ in range(steps):
                while len(order) < batch_size:  # batches span epochs, so every view is used equally often
                    order = torch.cat([order, torch.randperm(len(views), generator=generator)])
                index, order = order[:batch_size].tolist(), order[batch_size:]
                optimizer.zero_grad()
                control.shared_step(on_device(task, [views[i] for i in index]), "train")["loss"].backward()
                control.on_after_backward()
                optimizer.step()
                control.after_step(optimizer)
                scheduler.step()
        return control.eval()


@torch.no_grad()
def mean_psnr(task: Any, views: Any) -> float:
    """Returns the mean ``psnr`` of a task over the views of a dataset."""
    means = Means()
    for index in range(len(views)):
        means.add("psnr", task.shared_step(on_device(task, [views[index]]), "val")["psnr"], 1)
    return float(means.compute()["psnr"])


def on_device(task: Any, views: list[dict]) -> dict:
    """Collates views on the device of the task and converts them as in training."""
    batch = default_collate(views)
    moved = {key: value.to(task.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return task.on_after_batch_transfer(moved, 0)
