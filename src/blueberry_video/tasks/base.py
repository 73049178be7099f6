"""What all tasks share: turning a uint8 batch into a model's input, logging, and the optimiser."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import lightning
import torch
import torch.nn.functional as F
from einops import rearrange
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from blueberry_video.models.encoder import Encoder
from blueberry_video.optim import decayed_names, parameter_groups

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Task(lightning.LightningModule, ABC):
    """Base of every training objective; a subclass writes :meth:`shared_step`.

    Args:
        model: the network to train.
        optimizer: called with parameter groups, gives the optimiser; its ``weight_decay`` applies to matrices only.
        schedule: ``(step, total_steps) -> multiplier`` of the learning rate.
        augment: applied to training videos (B, C, T, H, W) in [0, 1] on the device.
        mean, std: of the pixels, by channel, that :meth:`normalize` takes out; the default is ImageNet's.
        lr_batch_size: the global batch the learning rate is meant for: at another batch it is scaled linearly.
            ``None`` takes the rate as it is. VideoMAE's published rates are for 256. Repeats do not count.
        layer_decay: factor on the learning rate from each layer of the encoder to the one before it, see
            :func:`~blueberry_video.optim.parameter_groups`; 1 is none.
        repeats: how often a training step takes each clip of the batch, each time augmented and masked anew: decoding
            a clip costs more than cutting it up differently (Hoffer et al., arXiv 1901.09335).
        image_repeats: the same for batches of single frames.

    Raises:
        ValueError: if ``model`` is not what this task trains, or for repeats below 1.

    Attributes:
        init_from: a checkpoint or published weights that ``model.encoder`` starts from; ``None`` for random weights.
    """

    trains: ClassVar[type[nn.Module]] = nn.Module  # what `model` must be
    model: nn.Module
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[list[dict]], Optimizer],
        schedule: Callable[[int, int], float],
        augment: nn.Module | None = None,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        lr_batch_size: int | None = None,
        layer_decay: float = 1.0,
        repeats: int = 1,
        image_repeats: int = 1,
    ):
        super().__init__()
        if not isinstance(model, self.trains):
            raise ValueError(
                f"task {type(self).__name__} trains a {self.trains.__name__}, but model is a {type(model).__name__}: "
                f"choose a model of conf/model/ whose _target_ is {self.trains.__name__}, or the task that fits it."
            )
        for key, times in (("repeats", repeats), ("image_repeats", image_repeats)):
            if times < 1:
                raise ValueError(f"task.{key}={times} must be 1 or more: 1 takes every clip once.")
        self.model = model
        self.augment = augment
        self.lr_batch_size, self.layer_decay = lr_batch_size, layer_decay
        self.repeats, self.image_repeats = repeats, image_repeats
        self.init_from: str | Path | None = None
        self._decayed: set[str] | None = None
        self._make_optimizer, self._schedule = optimizer, schedule
        self.register_buffer("pixel_mean", torch.tensor(list(mean)).view(-1, 1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(list(std)).view(-1, 1, 1, 1), persistent=False)

    @abstractmethod
    def shared_step(self, batch: dict, stage: str) -> dict[str, Tensor]:
        """The loss and what else is to be logged, by name.

        Args:
            batch: the collated clips, ``video`` float (B, C, T, H, W) in [0, 1].
            stage: ``"train"``, ``"val"`` or ``"test"``.

        Returns:
            ``loss`` (scalar) and other scalars, each logged as ``<stage>/<name>``.
        """

    def media(self, batch: dict) -> dict[str, Tensor]:
        """Pictures of what the model does with a batch: name -> uint8 (T, C, H, W). None by default."""
        return {}

    @staticmethod
    def panels(columns: list[Tensor]) -> Tensor:
        """Videos side by side: a row a clip, a column each of ``columns``, float (B, C, T, H, W) in [0, 1].

        Gives one video uint8 (T, C, height, width) with white lines between.
        """
        bordered = [F.pad(video, (0, 1, 0, 1), value=1.0) for video in columns]
        return rearrange(torch.cat(bordered, dim=4), "b c t h w -> t c (b h) w").mul(255).round().byte()

    def tokens_per_clip(self, batch: dict) -> int:
        """Number of tokens that training cuts a clip of this batch into, over all its repeats."""
        return math.prod(cast(Encoder, self.model.encoder).grid(batch["video"].shape)) * self._times(batch)

    def normalize(self, video: Tensor) -> Tensor:
        """[0, 1] -> zero mean and unit variance a channel: what the model takes."""
        return (video - self.pixel_mean) / self.pixel_std

    def setup(self, stage: str) -> None:
        """Loads ``init_from``: after the callbacks' setup, so that those can keep a copy of the untrained encoder."""
        if stage == "fit":
            self._decayed = decayed_names(self)  # now: a strategy may cut parameters into vectors
        if stage == "fit" and self.init_from is not None:
            rank_zero_only(print)(self.load_weights(self.init_from))

    def load_weights(self, path: str | Path) -> str:
        """Puts the weights in a file into the model: its encoder. Gives one sentence on what was loaded."""
        return cast(Encoder, self.model.encoder).load_published(path)

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        """uint8 (B, T, C, H, W) on the device -> float (B, C, T, H, W) in [0, 1]."""
        return {**batch, "video": batch["video"].transpose(1, 2).to(self.dtype).div(255)}

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        batch = repeat_clips(batch, self._times(batch))
        if self.augment is not None:  # here, not on transfer: a step's random numbers are set when the step begins
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
            # of the first group: the head's, which no layer decay lowers
            self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"], on_epoch=False)
        return values

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self._make_optimizer(parameter_groups(self, self.layer_decay, self._decayed))
        scale = 1.0 if self.lr_batch_size is None else self._global_batch_size() / self.lr_batch_size
        for group in optimizer.param_groups:
            group["lr"] *= scale * group["lr_scale"]
        total_steps = self.trainer.estimated_stepping_batches
        if math.isinf(total_steps):
            raise ValueError(
                "trainer.max_steps=-1 and trainer.max_epochs=-1 leave the run without an end, and its learning-rate "
                "schedule without a length: set one of the two."
            )
        total_steps = int(total_steps)
        scheduler = LambdaLR(optimizer, lambda step: self._schedule(min(step, total_steps - 1), total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _times(self, batch: dict) -> int:
        return self.image_repeats if batch["video"].shape[2] == 1 else self.repeats

    def _global_batch_size(self) -> int:
        per_device = self.trainer.datamodule.batch_size  # type: ignore[attr-defined]
        return per_device * self.trainer.world_size * self.trainer.accumulate_grad_batches


def repeat_clips(batch: dict, times: int) -> dict:
    """A collated batch in which each clip comes ``times`` in a row, with its id, its labels and all else it has."""

    def repeated(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.repeat_interleave(times, dim=0)
        if isinstance(value, dict):
            return {key: repeated(part) for key, part in value.items()}
        return [item for item in value for _ in range(times)]  # strings

    return batch if times == 1 else repeated(batch)
