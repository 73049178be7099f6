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

from blueberry_video.models.encoder import Encoder
from blueberry_video.optim import decayed_names, parameter_groups
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

    def __init__(
        self,
        model: nn.Module,
        optimization: Optimization,
        input: ClipInput | None = None,
    ):
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
        self._decayed: set[str] | None = None
        for name, values in (("pixel_mean", mean or IMAGENET_MEAN), ("pixel_std", std or IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(list(values)).view(-1, 1, 1, 1), persistent=False)

    @abstractmethod
    def shared_step(self, batch: dict, stage: str) -> dict[str, Tensor]:
        """Computes the loss and the metrics of a batch.

        Args:
            batch: collated clips; ``video`` is float (B, C, T, H, W) in [0, 1].
            stage: ``"train"``, ``"val"`` or ``"test"``.

        Returns:
            ``loss`` (scalar) and further scalars, each logged as ``<stage>/<name>``.
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
        if stage == "fit":
            self._decayed = decayed_names(self)  # before a strategy flattens parameters
        if stage == "fit" and self.optimization.init_from is not None:
            rank_zero_only(print)(self.load_weights(self.optimization.init_from))

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
        return self._step(batch, "train")["loss"]

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self._step(batch, "val")

    def test_step(self, batch: dict, batch_idx: int) -> None:
        self._step(batch, "test")

    def _step(self, batch: dict, stage: str) -> dict[str, Tensor]:
        values = self.shared_step(batch, stage)
        training = stage == "train"
        self.log_dict(
            {f"{stage}/{name}": value.detach() for name, value in values.items()},
            on_step=training,
            on_epoch=not training,
            batch_size=len(batch["video"]),
            sync_dist=not training,
        )
        if training:
            # the first group is that of the head, which layer decay does not change
            self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"], on_epoch=False)
        return values

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        settings = self.optimization
        optimizer = settings.optimizer(parameter_groups(self, settings.layer_decay, self._decayed))
        scale = 1.0 if settings.lr_batch_size is None else self._global_batch_size() / settings.lr_batch_size
        for group in optimizer.param_groups:
            group["lr"] *= scale * group["lr_scale"]
        total_steps = self.trainer.estimated_stepping_batches
        if math.isinf(total_steps):
            raise ValueError(
                "trainer.max_steps=-1 and trainer.max_epochs=-1 leave the length of the learning-rate schedule "
                "undefined: set one of them."
            )
        total_steps = int(total_steps)
        scheduler = LambdaLR(optimizer, lambda step: settings.schedule(min(step, total_steps - 1), total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _times(self, batch: dict) -> int:
        return self.input.image_repeats if batch["video"].shape[2] == 1 else self.input.repeats

    def _global_batch_size(self) -> int:
        per_device = self.trainer.datamodule.batch_size  # type: ignore[attr-defined]
        return per_device * self.trainer.world_size * self.trainer.accumulate_grad_batches


def repeat_clips(batch: dict, times: int) -> dict:
    """Repeats each clip of a collated batch ``times`` in a row, with all its entries."""

    def repeated(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.repeat_interleave(times, dim=0)
        if isinstance(value, dict):
            return {key: repeated(part) for key, part in value.items()}
        return [item for item in value for _ in range(times)]  # strings

    return batch if times == 1 else repeated(batch)
