"""Supervised classification of clips: training from scratch, fine-tuning, and (frozen encoder) probing."""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.augmentation import Mixing, soft_targets
from blueberry_video.evaluation.class_report import ClassReport, ClassScores
from blueberry_video.evaluation.metrics import ClassCounts, ViewScores, accuracy, shuffle_frames, within_pair_correct
from blueberry_video.evaluation.reference import clip_seeds
from blueberry_video.models.classifier import VideoClassifier
from blueberry_video.tasks.base import Task
from blueberry_video.tasks.settings import ClipInput, Optimization


def soft_cross_entropy(logits: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Cross-entropy with class probabilities, averaged over labels and clips; both are label -> (B, classes)."""
    return torch.stack([F.cross_entropy(logits[name].float(), target) for name, target in targets.items()]).mean()


class Classification(Task):
    """Cross-entropy over one or several labels.

    Logs ``loss`` and the accuracy of each label under its name, in training of the last batch without mixing. Controls
    in validation: ``<label>_trivial``, the share of the most frequent class; for labels with classes that are reversals
    of each other, ``<label>_shuffled``, the accuracy on clips with shuffled frames, and ``<label>_within_pairs`` and
    ``<label>_within_pairs_shuffled``, the accuracy between the two classes of a pair (chance level 0.5). Where
    validation has several views of each video (see :class:`~blueberry_video.evaluation.metrics.ViewScores`),
    ``<label>`` is the accuracy of single views and ``<label>_views`` that of scores averaged per video. In validation
    also ``<label>_mean_class``, the mean accuracy over the classes that occur, ``<label>_calibration_error``, and, for
    more than five classes, ``<label>_top5``, see :class:`~blueberry_video.evaluation.class_report.ClassReport`.

    Args:
        model, optimization, input: see :class:`~blueberry_video.tasks.base.Task`.
        mixing: mixes the clips and labels of a training batch, after ``augment``.
        label_smoothing: of the training loss, in [0, 1).
        num_pictures: number of clips in :meth:`media`.

    Attributes:
        class_reports: label -> result of the last validation or test.

    Raises:
        ValueError: if ``model`` is not a VideoClassifier, or for a smoothing outside [0, 1).
    """

    trains = VideoClassifier
    model: VideoClassifier

    def __init__(
        self,
        model: VideoClassifier,
        optimization: Optimization,
        input: ClipInput | None = None,
        mixing: Mixing | None = None,
        label_smoothing: float = 0.0,
        num_pictures: int = 6,
    ):
        super().__init__(model, optimization, input)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"task.label_smoothing={label_smoothing} is outside [0, 1): the field uses 0.1.")
        self.mixing, self.label_smoothing = mixing, label_smoothing
        self.num_pictures = num_pictures
        self.untrained = copy.deepcopy(model) if model.freeze_encoder else None  # before init_from is loaded
        self._classes = ClassCounts()
        self._views = ViewScores()
        self._scores = ClassScores()
        self.class_reports: dict[str, ClassReport] = {}

    def load_weights(self, path: str | Path) -> str:
        return self.model.load_published(path)

    def shared_step(self, batch: dict, stage: str) -> dict[str, Tensor]:
        video, own, smoothing = batch["video"], 1.0, 0.0
        if stage == "train":
            smoothing = self.label_smoothing
            if self.mixing is not None:
                video, own = self.mixing(video)
        inputs = self.normalize(video)
        frames = (batch["frames"],) if "frames" in batch else ()  # of data with sampler=segments
        logits = self.model(inputs, *frames)
        labels = {name: batch["labels"][name] for name in logits}
        targets = {name: soft_targets(labels[name], logits[name].shape[1], own, smoothing) for name in logits}
        values = self.losses(inputs, logits, targets)
        if own == 1:
            values |= {name: accuracy(logits[name], labels[name]) for name in logits}
        if self.untrained is not None:
            untrained = self.untrained(inputs, *frames)
            control = soft_cross_entropy(untrained, targets)
            values["loss"] = values["loss"] + (control - control.detach())  # value of the probe, gradients of both
            values |= {f"{name}_random_init": accuracy(untrained[name], labels[name]) for name in logits if own == 1}
        if stage != "train":
            self._classes.add(labels)
            self._scores.add(logits, labels)
            self._views.add(batch.get("id", []), logits, labels)
            values |= self._motion_controls(video, frames, logits, labels, clip_seeds(batch))
        return values

    def losses(self, inputs: Tensor, logits: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Computes ``loss`` and its terms.

        Args:
            inputs: (B, C, T, H, W), input of the model.
            logits: label -> (B, classes), its output.
            targets: label -> class probabilities (B, classes), mixed and smoothed.
        """
        return {"loss": soft_cross_entropy(logits, targets)}

    def _motion_controls(
        self,
        video: Tensor,
        frames: tuple[Tensor, ...],
        logits: dict[str, Tensor],
        labels: dict[str, Tensor],
        seeds: list[int],
    ) -> dict[str, Tensor]:
        """Accuracies on shuffled frames, for labels that depend on the order of frames."""
        pairs = self.trainer.datamodule.reversal_pairs  # type: ignore[attr-defined]
        names = [name for name in logits if name in pairs and video.shape[2] > 1]
        if not names:
            return {}
        shuffled = self.model(self.normalize(shuffle_frames(video, seeds)), *frames)
        values = {f"{name}_shuffled": accuracy(shuffled[name], labels[name]) for name in names}
        for name in names:
            values[f"{name}_within_pairs_trivial"] = video.new_tensor(0.5)
            for suffix, scores in (("", logits), ("_shuffled", shuffled)):
                correct = within_pair_correct(scores[name], labels[name], pairs[name])
                values[f"{name}_within_pairs{suffix}"] = correct.float()
        return values

    def epoch_metrics(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        values = {f"{name}_trivial": share for name, share in self._classes.majority_shares().items()}
        self.class_reports = self._scores.compute()
        for name, report in self.class_reports.items():
            values[f"{name}_mean_class"] = torch.tensor(report.mean_class_accuracy)
            values[f"{name}_calibration_error"] = torch.tensor(report.calibration_error)
            if len(report.confusion) > 5:
                values[f"{name}_top5"] = torch.tensor(report.top5)
        return values | {f"{name}_views": torch.tensor(value) for name, value in self._views.accuracies().items()}

    def media(self, batch: dict) -> dict[str, Tensor]:
        """``clips``: one row per input clip."""
        return {"clips": self.panels([batch["video"][: self.num_pictures]])}
