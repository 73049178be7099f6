"""Base class of tasks: preparation of batches, logging, and the optimizer."""

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, cast

import lightning
import torch
import torch.nn.functional as F
from einops import rearrange
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from blueberry_video.augmentation import repeat_clips
from blueberry_video.evaluation.metrics import Means
from blueberry_video.models.encoder import Encoder
from blueberry_video.optim import parameter_groups
from blueberry_video.tasks.settings import ClipInput, Optimization

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Task(lightning.LightningModule, ABC):
    """Base class of training objectives; a subclass implements :meth:`shared_step`.

    Args:
        model: the network to train.
        optimization: optimizer, schedule, and weights to start from, loaded by :meth:`load_weights`.
        input: augmentation, repetition and normalization of clips; ``None``: the defaults.

    Raises:
        ValueError: if ``model`` is not an instance of :attr:`trains`, or for ``mean`` or ``std`` of a task that does
            not normalize.
    """

    trains: ClassVar[type[nn.Module]] = nn.Module  # required class of `model`
    normalizes: ClassVar[bool] = True  # False: the model receives pixels in [-1, 1]
    model: nn.Module
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, model: nn.Module, optimization: Optimization, input: ClipInput | None = None):
        super().__init__()
        if not isinstance(model, self.trains):
            raise ValueError(
                f"task._target_={type(self).__name__} requires a {self.trains.__name__}, but model._target_ is "
                f"{type(model).__name__}: choose a {self.trains.__name__} of conf/model/, or a different task."
            )
        self.input = input or ClipInput()
        mean, std = self.input.mean, self.input.std
        if not self.normalizes and (mean is not None or std is not None):
            raise ValueError(
                f"task.input.mean={mean} and task.input.std={std} have no effect on {type(self).__name__}: its "
                "model receives pixels in [-1, 1]. Leave both null."
            )
        self.model, self.optimization = model, optimization
        self.augment = self.input.augment  # a submodule: it moves to the device
        self._step_values: dict[str, list[Tensor]] = {}  # of the batches of the running optimizer step
        self._means = Means()  # of the running validation or test epoch
        for name, values in (("pixel_mean", mean or IMAGENET_MEAN), ("pixel_std", std or IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(list(values)).view(-1, 1, 1, 1), persistent=False)

    @abstractmethod
    def shared_step(self, batch: dict, stage: str) -> dict[str, Tensor]:
        """Computes the loss and the metrics of a batch.

        Args:
            batch: collated clips; ``video`` is float (B, C, T, H, W) in [0, 1].
            stage: ``"train"``, ``"val"`` or ``"test"``.

        Returns:
            ``loss`` and further metrics, logged as ``<stage>/<name>``: scalars, the means over the clips of the batch,
            or in evaluation also vectors, of which every element counts once in the mean over the set.
        """

    def media(self, batch: dict) -> dict[str, Tensor]:
        """Visualizes a batch: name -> video uint8 (T, C, H, W). Empty by default."""
        return {}

    @staticmethod
    def panels(columns: list[Tensor]) -> Tensor:
        """Arranges videos in a grid: one row per clip, one column per item, float (B, C, T, H, W) in [0, 1].

        Returns one video uint8 (T, C, height, width) with white lines between the cells.
        """
        bordered = [F.pad(video, (0, 1, 0, 1), value=1.0) for video in columns]
        return rearrange(torch.cat(bordered, dim=4), "b c t h w -> t c (b h) w").mul(255).round().byte()

    def tokens_per_clip(self, batch: dict) -> int:
        """Number of tokens of a clip in a training step, over all its repeats."""
        return math.prod(cast(Encoder, self.model.encoder).grid(batch["video"].shape)) * self._times(batch)

    def normalize(self, video: Tensor) -> Tensor:
        """Normalizes pixels in [0, 1] with ``input.mean`` and ``input.std``."""
        return (video - self.pixel_mean) / self.pixel_std

    def setup(self, stage: str) -> None:
        """Loads ``init_from``, after the setup of callbacks, which may copy the untrained encoder."""
        if stage == "fit" and self.optimization.init_from is not None:
            rank_zero_only(print)(self.load_weights(self.optimization.init_from))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Casts the module, which Lightning would do after loading, and so round float64 weights to float32."""
        if self._trainer is not None:
            self.trainer.strategy.precision_plugin.convert_module(self)

    def load_weights(self, path: str | Path) -> str:
        """Loads weights into the model, by default into its encoder; returns a sentence on what was loaded."""
        return cast(Encoder, self.model.encoder).load_published(path)

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        """Converts uint8 (B, T, C, H, W) to float (B, C, T, H, W) in [0, 1] on the device."""
        return {**batch, "video": batch["video"].transpose(1, 2).to(self.dtype).div(255)}

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        batch = repeat_clips(batch, self._times(batch))
        if self.augment is not None:  # not on transfer: generators are seeded when the step begins
            batch = {**batch, "video": self.augment(batch["video"])}
        values = self.shared_step(batch, "train")
        accumulate = self.trainer.accumulate_grad_batches
        first = batch_idx - batch_idx % accumulate  # of the batches of this optimizer step
        if batch_idx == first:
            self._step_values = {}
        for name, value in values.items():
            self._step_values.setdefault(name, []).append(value.detach())
        # the last batch of a step logs the mean over its batches
        self.log_dict({f"train/{name}": torch.stack(found).mean() for name, found in self._step_values.items()})
        # of the first group: that of the head, which layer decay does not change
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        batches = min(accumulate, int(self.trainer.num_training_batches) - first)  # fewer at the end of an epoch
        return values["loss"] if batches == accumulate else values["loss"] * (accumulate / batches)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self._evaluation_step(batch, "val")

    def test_step(self, batch: dict, batch_idx: int) -> None:
        self._evaluation_step(batch, "test")

    def on_validation_epoch_start(self) -> None:
        self._means = Means()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        self._log_epoch("test")

    def epoch_metrics(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Computes metrics of a whole validation or test set from the means over it of all that :meth:`shared_step`
        returned, by name; every process must return the same. Empty by default."""
        return {}

    def _evaluation_step(self, batch: dict, stage: str) -> None:
        for name, value in self.shared_step(batch, stage).items():
            self._means.add(name, value.to(self.device), len(batch["video"]))

    def _log_epoch(self, stage: str) -> None:
        means = self._means.compute()
        values = means | self.epoch_metrics(means)
        # on the device: NCCL does not reduce tensors of the CPU
        self.log_dict({f"{stage}/{name}": value.to(self.device) for name, value in values.items()}, sync_dist=True)

    def parameter_groups(self) -> list[dict]:
        """Parameter groups of the optimizer; see :func:`~blueberry_video.optim.parameter_groups`."""
        return parameter_groups(self, self.optimization.layer_decay, self.optimization.layer_decay_head)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        settings = self.optimization
        optimizer = settings.optimizer(self.parameter_groups())
        total_steps = self.trainer.estimated_stepping_batches
        if math.isinf(total_steps):
            raise ValueError(
                "trainer.max_steps=-1 and trainer.max_epochs=-1 leave the length of the learning-rate schedule "
                "undefined: set one of them."
            )
        scale = 1.0 if settings.lr_batch_size is None else self._clips_per_step() / settings.lr_batch_size
        for group in optimizer.param_groups:
            group["lr"] *= scale * group["lr_scale"]
        total_steps = int(total_steps)
        scheduler = LambdaLR(optimizer, lambda step: settings.schedule(min(step, total_steps - 1), total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _times(self, batch: dict) -> int:
        return self.input.image_repeats if batch["video"].shape[2] == 1 else self.input.repeats

    def _clips_per_step(self) -> float:
        """Mean number of clips of an optimizer step, over all processes."""
        self.trainer.fit_loop.setup_data()
        batches: Any = self.trainer.train_dataloader
        accumulated = min(self.trainer.accumulate_grad_batches, self.trainer.num_training_batches)
        return batches.batch_sampler.clips_per_batch * accumulated
