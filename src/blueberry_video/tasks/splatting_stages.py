"""Base of scene reconstruction: two stages, learning rates by role, and density control."""

import math
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from blueberry_video.models.gaussian_splatting import GaussianSplatting4D, Rasterized, Static
from blueberry_video.models.gaussian_splatting.densify import Densification, Statistics, densify, reset_opacities
from blueberry_video.optim import exponential
from blueberry_video.tasks.base import Task
from blueberry_video.tasks.settings import ClipInput, Optimization
from blueberry_video.tasks.splatting_settings import DECAYED, LearningRates


class StagedReconstruction(Task):
    """Optimizes Gaussians in two stages: canonical Gaussians without dynamics for ``coarse_steps``, then both.

    The step of a stage is counted from its start. The checkpoint contains the number of Gaussians, the statistics of
    the density control and the number of steps. A subclass sets ``_rendered`` in each training step.

    Args:
        model, optimization, input: see :class:`~blueberry_video.tasks.base.Task`. The learning rate of the optimizer
            multiplies ``learning_rates``; the schedule applies to the roles ``DECAYED``, in each stage from its start,
            over the number of steps of the second one.
        learning_rates, densification: see their classes.
        coarse_steps: steps of the first stage.

    Raises:
        ValueError: for settings that have no effect; when a run begins: no steps for the second stage, or an optimizer
            with weight decay.
    """

    trains = GaussianSplatting4D
    normalizes = False
    model: GaussianSplatting4D
    steps: Tensor

    def __init__(
        self,
        model: GaussianSplatting4D,
        optimization: Optimization,
        input: ClipInput | None,
        learning_rates: LearningRates | None,
        densification: Densification | None,
        coarse_steps: int,
    ):
        super().__init__(model, optimization, input)
        if self.augment is not None or self.input.repeats > 1 or self.input.image_repeats > 1:
            raise ValueError(
                f"task.input.augment={self.augment} and repeats={self.input.repeats} must be null and 1 for "
                "task=splatting: augmented views do not fit their cameras."
            )
        if optimization.layer_decay != 1 or optimization.lr_batch_size is not None:
            raise ValueError(
                f"task.optimization.layer_decay={optimization.layer_decay} and "
                f"lr_batch_size={optimization.lr_batch_size} must be 1 and null for task=splatting: set "
                "task.learning_rates."
            )
        if coarse_steps < 0:
            raise ValueError(f"task.coarse_steps={coarse_steps} must be at least 0.")
        self.learning_rates, self.densification = learning_rates or LearningRates(), densification or Densification()
        self.coarse_steps = coarse_steps
        self.extent = 1.0
        self.statistics = Statistics(model.number)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # optimizer steps
        self._rendered: Rasterized | None = None  # of the running step

    @property
    def in_first_stage(self) -> bool:
        """True if the next step trains canonical Gaussians without dynamics."""
        return int(self.steps) < self.coarse_steps

    def on_after_backward(self) -> None:
        """Adds the gradients of the step to the statistics of the density control."""
        if self._rendered is not None:
            self.statistics.update(self._rendered)
            self._rendered = None

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Steps the optimizer, then densifies, before a checkpoint of this step can be saved."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.after_step(getattr(optimizer, "optimizer", optimizer))

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Counts an optimizer step; densifies, prunes and resets opacities where these are due.

        Positions of new Gaussians are drawn from the global generator, which is seeded in each step.
        """
        self.steps += 1
        finished = int(self.steps)
        step = finished if finished <= self.coarse_steps else finished - self.coarse_steps
        control = self.densification
        if control.densifies_at(step):
            prune_large = control.prunes_large_at(step)
            densify(self.model, self.statistics, control, self.extent, optimizer, prune_large=prune_large)
            if finished > self.coarse_steps:
                self.model.dynamics.after_densification(self.model.gaussians)
        if control.resets_at(step):
            reset_opacities(self.model, control, optimizer)

    def parameter_groups(self) -> list[dict]:
        """Parameter groups by role; ``lr_scale`` is the learning rate."""
        rates = self.learning_rates.of(list(self.model.parameter_roles()), self.extent)
        groups = self.model.optimizer_groups(rates)
        return [{"params": each["params"], "lr_scale": each["lr"], "name": each["name"]} for each in groups]

    def rate_factor(self, role: str, step: int, total_steps: int) -> float:
        """Returns the factor of the schedule on the learning rate of a role at a step, counted from 0."""
        length, in_second = max(total_steps - self.coarse_steps, 1), step >= self.coarse_steps
        position = min(step - self.coarse_steps if in_second else step, length - 1)
        if role in DECAYED:
            return self.optimization.schedule(position, length)
        return exponential(position, length, self.learning_rates.others_final) if in_second else 1.0

    def build_optimizer(self, total_steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """Returns the optimizer and its schedule for a number of steps."""
        optimizer = self.optimization.optimizer(self.parameter_groups())
        if decay := optimizer.defaults.get("weight_decay"):
            raise ValueError(
                f"optimizer.weight_decay={decay} must be 0 for task=splatting: choose optimizer=splatting (Adam with "
                "lr=1, a factor on task.learning_rates), and schedule=exponential."
            )
        if not isinstance(self.model.dynamics, Static) and total_steps <= self.coarse_steps:
            raise ValueError(
                f"trainer.max_steps={total_steps} must be above task.coarse_steps={self.coarse_steps}: the first stage "
                "does not train the dynamics."
            )
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_scale"]

        def factor(role: str) -> Any:
            return lambda step: self.rate_factor(role, step, total_steps)

        return optimizer, LambdaLR(optimizer, [factor(group["name"]) for group in optimizer.param_groups])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        total_steps = self.trainer.estimated_stepping_batches
        if math.isinf(total_steps):
            raise ValueError("trainer.max_steps=-1 and trainer.max_epochs=-1: set one of them, for the schedule.")
        optimizer, scheduler = self.build_optimizer(int(total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
