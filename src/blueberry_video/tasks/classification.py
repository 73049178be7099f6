"""Supervised classification of clips: training from scratch, fine-tuning, and (frozen encoder) probing."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from blueberry_video.evaluation.metrics import accuracy, shuffle_frames, within_pair_correct
from blueberry_video.models.classifier import VideoClassifier
from blueberry_video.tasks.base import IMAGENET_MEAN, IMAGENET_STD, Task


class Classification(Task):
    """Cross-entropy over one or several labels.

    Logs ``loss`` and the accuracy of every label by its name. In validation also the controls: ``<label>_trivial``,
    the share of the most frequent class; and, for labels whose classes are reversals of each other,
    ``<label>_shuffled``, the accuracy on clips whose frames were shuffled, with ``<label>_within_pairs`` and
    ``<label>_within_pairs_shuffled``, how well the two classes of a pair are told apart (chance: 0.5).

    Args:
        model, optimizer, schedule, augment, mean, std, lr_batch_size: see :class:`~blueberry_video.tasks.base.Task`.
        label_smoothing: of the training loss, in [0, 1).
        num_pictures: clips shown in :meth:`media`.
    """

    trains = VideoClassifier
    model: VideoClassifier

    def __init__(
        self,
        model: VideoClassifier,
        optimizer: Callable[[list[dict]], Optimizer],
        schedule: Callable[[int, int], float],
        augment: nn.Module | None = None,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        lr_batch_size: int | None = None,
        label_smoothing: float = 0.0,
        num_pictures: int = 6,
    ):
        super().__init__(model, optimizer, schedule, augment, mean, std, lr_batch_size)
        self.label_smoothing = label_smoothing
        self.num_pictures = num_pictures
        self.untrained = copy.deepcopy(model) if model.freeze_encoder else None  # before init_from is loaded
        self._class_counts: dict[str, Tensor] = {}

    def shared_step(self, batch: dict, stage: str) -> dict[str, Tensor]:
        inputs = self.normalize(batch["video"])
        logits = self.model(inputs)
        labels = {name: batch["labels"][name] for name in logits}
        values = {"loss": self._loss(logits, labels, stage)}
        values |= {name: accuracy(logits[name], labels[name]) for name in logits}
        if self.untrained is not None:
            untrained = self.untrained(inputs)
            beside = self._loss(untrained, labels, stage)
            values["loss"] = values["loss"] + (beside - beside.detach())  # the loss of the probe, the gradients of both
            values |= {f"{name}_random_init": accuracy(untrained[name], labels[name]) for name in logits}
        if stage != "train":
            self._count_classes(logits, labels)
            values |= self._motion_controls(batch["video"], logits, labels)
        return values

    def _loss(self, logits: dict[str, Tensor], labels: dict[str, Tensor], stage: str) -> Tensor:
        """Mean over the labels of their cross-entropies."""
        smoothing = self.label_smoothing if stage == "train" else 0.0
        losses = [F.cross_entropy(logits[name].float(), labels[name], label_smoothing=smoothing) for name in logits]
        return torch.stack(losses).mean()

    def _motion_controls(
        self, video: Tensor, logits: dict[str, Tensor], labels: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Accuracies on shuffled frames, of the labels that shuffling should destroy."""
        pairs = self.trainer.datamodule.reversal_pairs  # type: ignore[attr-defined]
        names = [name for name in logits if name in pairs]
        if not names:
            return {}
        shuffled = self.model(self.normalize(shuffle_frames(video, torch.Generator().manual_seed(0))))
        values = {f"{name}_shuffled": accuracy(shuffled[name], labels[name]) for name in names}
        for name in names:
            values[f"{name}_within_pairs_trivial"] = video.new_tensor(0.5)  # a coin
            for suffix, given in (("", logits), ("_shuffled", shuffled)):
                correct = within_pair_correct(given[name], labels[name], pairs[name])
                self._log_mean(f"val/{name}_within_pairs{suffix}", correct)
        return values

    def _log_mean(self, key: str, values: Tensor) -> None:
        """Weighs each batch by how many values it has: also none, since every process must log alike."""
        mean = values.float().sum() / max(len(values), 1)
        self.log(key, mean, on_step=False, on_epoch=True, batch_size=len(values), sync_dist=True)

    def _count_classes(self, logits: dict[str, Tensor], labels: dict[str, Tensor]) -> None:
        for name, label in labels.items():
            counts = label.bincount(minlength=logits[name].shape[1])
            self._class_counts[name] = self._class_counts.get(name, 0) + counts

    def on_validation_epoch_end(self) -> None:
        for name, counts in self._class_counts.items():
            counts = self.trainer.strategy.reduce(counts.float(), reduce_op="sum")
            self.log(f"val/{name}_trivial", counts.max() / counts.sum())
        self._class_counts.clear()

    def media(self, batch: dict) -> dict[str, Tensor]:
        """``clips``: a row a clip, as the model gets them."""
        return {"clips": self.panels([batch["video"][: self.num_pictures]])}
