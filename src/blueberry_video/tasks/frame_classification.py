"""Supervised classification of every frame: of what is in it, or of what is known of the clip by then."""

import torch
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.evaluation.metrics import accuracy
from blueberry_video.evaluation.trivial import majority_share
from blueberry_video.models.classifier import FrameClassifier
from blueberry_video.tasks.base import Task
from blueberry_video.tasks.settings import ClipInput, Optimization


def labels_of_moments(labels: Tensor, moments: int) -> Tensor:
    """A label for every moment, (B, moments): that of the clip (B,), or of the last frame of each moment's (B, T).

    Raises:
        ValueError: for labels of frames that the moments do not divide.
    """
    if labels.ndim == 1:
        return labels[:, None].expand(-1, moments)
    if labels.ndim != 2 or labels.shape[1] % moments:
        raise ValueError(
            f"labels have the shape {tuple(labels.shape)}, but the model speaks of {moments} moments of a clip: give a "
            "label a clip, (B,), or one a frame, (B, T), with T a multiple of the moments."
        )
    tubelet = labels.shape[1] // moments
    return labels[:, tubelet - 1 :: tubelet]


class FrameClassification(Task):
    """Cross-entropy over one or several labels at every moment of a clip; labels are of clips or of frames.

    Logs ``loss``; the accuracy of every label over all moments, by its name; ``<label>_first`` and ``<label>_last``, at
    the first and the last moment; in validation also ``<label>_trivial``, the share of a batch's most frequent class.

    Args:
        model, optimization, input: see :class:`~blueberry_video.tasks.base.Task`.
        num_pictures: clips shown in :meth:`media`.

    Raises:
        ValueError: if ``model`` is no frame classifier; for labels that do not fit its moments.
    """

    trains = FrameClassifier
    model: FrameClassifier

    def __init__(
        self,
        model: FrameClassifier,
        optimization: Optimization,
        input: ClipInput | None = None,
        num_pictures: int = 6,
    ):
        super().__init__(model, optimization, input)
        self.num_pictures = num_pictures

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
                values[f"{name}_trivial"] = scores.new_tensor(majority_share(labels.flatten()))
        return {"loss": torch.stack(losses).mean(), **values}

    def media(self, batch: dict) -> dict[str, Tensor]:
        """``clips``: a row a clip, as the model gets them."""
        return {"clips": self.panels([batch["video"][: self.num_pictures]])}
