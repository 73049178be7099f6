"""Knowledge distillation of a classifier from a larger, frozen one (Hinton et al., arXiv 1503.02531).

VideoMAE V2 (arXiv 2303.16727) trains its distilled ViT-S and ViT-B this way, from ViT-g on Kinetics-710.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from blueberry_video.augmentation import Mixing
from blueberry_video.evaluation.metrics import accuracy
from blueberry_video.models.classifier import VideoClassifier
from blueberry_video.tasks.classification import Classification, soft_cross_entropy
from blueberry_video.tasks.settings import ClipInput, Optimization


def distillation_loss(student: dict[str, Tensor], teacher: dict[str, Tensor], temperature: float) -> Tensor:
    """KL divergence between softened class probabilities of teacher and student, times the squared temperature, which
    preserves the scale of gradients. Averaged over labels and clips.

    Args:
        student, teacher: label -> logits (B, classes).
        temperature: above 0; both logits are divided by it.
    """
    parts = []
    for name, logits in student.items():
        log_student, log_teacher = ((values.float() / temperature).log_softmax(1) for values in (logits, teacher[name]))
        parts.append(F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True))
    return torch.stack(parts).mean() * temperature**2


class Distillation(Classification):
    """Trains a classifier on the logits of a frozen one and, with a weight, on the labels.

    Both receive the same augmented and mixed clips (Beyer et al., arXiv 2106.05237). Logs the metrics of
    :class:`~blueberry_video.tasks.classification.Classification`, ``loss_soft``, ``loss_hard`` and, in validation,
    ``<label>_teacher``, the accuracy of the teacher. Checkpoints do not contain the teacher.

    Args:
        model: the student.
        optimization, input, mixing, label_smoothing, num_pictures: see
            :class:`~blueberry_video.tasks.classification.Classification`; mixing and smoothing apply to the labels,
            not to the teacher's logits.
        teacher: classifier with the same labels and numbers of classes as the student.
        teacher_from: file of its weights including the heads, published or of a run.
        temperature: of both softmaxes, above 0.
        hard_weight: weight of the cross-entropy with the labels, at least 0.

    Raises:
        ValueError: if the labels of teacher and student differ, or for a temperature or weight out of range; when
            training begins, if ``teacher_from`` does not contain the weights of the teacher.
        FileNotFoundError: when training begins, if the file does not exist.
    """

    teacher: VideoClassifier

    def __init__(
        self,
        model: VideoClassifier,
        optimization: Optimization,
        teacher: VideoClassifier,
        teacher_from: str | Path,
        input: ClipInput | None = None,
        mixing: Mixing | None = None,
        label_smoothing: float = 0.0,
        num_pictures: int = 6,
        temperature: float = 1.0,
        hard_weight: float = 0.0,
    ):
        super().__init__(model, optimization, input, mixing, label_smoothing, num_pictures)
        if temperature <= 0 or hard_weight < 0:
            raise ValueError(
                f"task.temperature={temperature} must be above 0 and task.hard_weight={hard_weight} at least 0."
            )
        if model.num_classes != teacher.num_classes:
            raise ValueError(
                f"task.teacher.num_classes={teacher.num_classes} and model.num_classes={model.num_classes} differ: set "
                "both to the same labels and numbers."
            )
        # not registered as a submodule, which would be trained, averaged, sharded and written to checkpoints
        self.__dict__["teacher"] = teacher.requires_grad_(False).eval()
        self.teacher_from: str | Path | None = teacher_from
        self.temperature, self.hard_weight = temperature, hard_weight

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.teacher_from is not None:  # once: setup also runs for validation
            rank_zero_only(print)(f"teacher: {self.teacher.load_finetuned(self.teacher_from)}")
            self.teacher_from = None

    def losses(self, inputs: Tensor, logits: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            answers = self.teacher.to(inputs)(inputs)  # on the device and in the precision of the step
        soft = distillation_loss(logits, answers, self.temperature)
        hard = soft_cross_entropy(logits, targets)
        values = {"loss": soft + self.hard_weight * hard, "loss_soft": soft, "loss_hard": hard}
        if not self.training:
            values |= {f"{name}_teacher": accuracy(answers[name], targets[name].argmax(dim=1)) for name in answers}
        return values
