"""Supervised classification of every frame, or of the clip from the frames up to each one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.evaluation.metrics import ClassCounts, accuracy
from blueberry_video.models.classifier import FrameClassifier
from blueberry_video.tasks.base import Task
from blueberry_video.tasks.settings import ClipInput, Optimization


def labels_of_moments(labels: Tensor, moments: int) -> Tensor:
    """Labels per time step of the model (B, moments), from labels per clip (B,), which are repeated, or per frame
    (B, T), where the last frame of each step counts.

    Raises:
        ValueError: if T is not a multiple of ``moments``.
    """
    if labels.ndim == 1:
        return labels[:, None].expand(-1, moments)
    if labels.ndim != 2 or labels.shape[1] % moments:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit the {moments} time steps of the model: use one label "
            f"per clip, (B,), or one per frame, (B, T) with T a multiple of {moments}."
        )
    tubelet = labels.shape[1] // moments
    return labels[:, tubelet - 1 :: tubelet]


class FrameClassification(Task):
    """Cross-entropy over one or several labels at every time step; labels are per clip or per frame.

    Logs ``loss``; for each label the accuracy over all time steps under its name, and ``<label>_first`` and
    ``<label>_last`` at the first and last; in validation also ``<label>_trivial``, the share of the most frequent
    class.

    Args:
        model, optimization, input: see :class:`~blueberry_video.tasks.base.Task`.
        num_pictures: number of clips in :meth:`media`.

    Raises:
        ValueError: if ``model`` is not a FrameClassifier, or for labels that do not fit its time steps.
    """

    trains = FrameClassifier
    model: FrameClassifier

    def __init__(
        self, model: FrameClassifier, optimization: Optimization, input: ClipInput | None = None, num_pictures: int = 6
    ):
        super().__init__(model, optimization, input)
        self.num_pictures = num_pictures
        self._classes = ClassCounts()

    def shared_step(self, batch: dict, stage: str) -> dict[str, Tensor]:
        logits = self.model(self.normalize(batch["video"]))
        losses, values = [], {}
        for name, scores in logits.items():
            labels = labels_of_moments(batch["labels"][name], scores.shape[1])
            losses.append(F.cross_entropy(scores.flatten(0, 1).float(), labels.flatten()))
            values[name] = accuracy(scores.flatten(0, 1), labels.flatten())
            values[f"{name}_first"] = accuracy(scores[:, 0], labels[:, 0])
            values[f"{name}_last"] = accuracy(scores[:, -1], labels[:, -1])
            if stage != "train":
                self._classes.add({name: labels.flatten()})
        return {"loss": torch.stack(losses).mean(), **values}

    def epoch_metrics(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"{name}_trivial": share for name, share in self._classes.majority_shares().items()}

    def media(self, batch: dict) -> dict[str, Tensor]:
        """``clips``: one row per input clip."""
        return {"clips": self.panels([batch["video"][: self.num_pictures]])}
