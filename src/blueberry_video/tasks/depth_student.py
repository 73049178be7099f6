"""Input and output of models of depth: predictions of clips, flips, strong augmentation and CutMix."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blueberry_video.augmentation import HorizontalFlip, MultiScaleCrop, RandomResizedCrop, random_boxes

BOX_AREA, BOX_RATIO = (0.02, 0.4), (0.3, 1 / 0.3)  # of CutMix in UniMatch (arXiv 2208.09910)


@dataclass(frozen=True)
class StudentView:
    """Strongly augmented clips and their pseudo-labels.

    Args:
        video: (B, C, T, H, W) in [0, 1].
        target: disparity (B, T, H, W) of the teacher on the clean clips, and ``valid``, its mask.
        pasted: disparity of the clips from which boxes were pasted, and ``mask``, the boxes; both ``None`` without
            CutMix.
    """

    video: Tensor
    target: Tensor
    valid: Tensor
    pasted: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class Student:
    """Training on pseudo-labels: strong augmentation, CutMix, and the weight of these clips.

    Args:
        augment: strong augmentation of the colors of the clips that the student receives, such as
            :class:`~blueberry_video.augmentation.ColorJitter`; the teacher receives the clips without it.
        cutmix: probability that a box of another clip of the batch is pasted into a clip; 0.5 in Depth Anything.
        weight: weight of pseudo-labelled clips; 0.5 in Video Depth Anything.

    Raises:
        ValueError: ``cutmix`` is outside [0, 1], or the weight is not positive.
    """

    augment: nn.Module | None = None
    cutmix: float = 0.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.cutmix <= 1:
            raise ValueError(f"task.student.cutmix={self.cutmix} must be a probability, in [0, 1].")
        if not self.weight > 0:
            raise ValueError(f"task.student.weight={self.weight} must be above 0.")

    def view(self, video: Tensor, target: Tensor, valid: Tensor) -> StudentView:
        """Augments clips (B, C, T, H, W) in [0, 1]; a box is at the same position in all frames."""
        if self.augment is not None:
            video = self.augment(video)
        if self.cutmix == 0:
            return StudentView(video, target, valid)
        clips, (height, width) = len(video), video.shape[-2:]
        boxes, fits = random_boxes(clips, height, width, BOX_AREA, BOX_RATIO)
        fits &= torch.rand(clips) < self.cutmix
        mask = torch.zeros(clips, 1, height, width, dtype=torch.bool)
        for clip in fits.nonzero().flatten().tolist():
            top, left, tall, wide = boxes[clip].tolist()
            mask[clip, :, top : top + tall, left : left + wide] = True
        mask = mask.to(video.device).expand_as(target)
        other = target.roll(1, 0)
        mixed = torch.where(mask[:, None], video.roll(1, 0), video)
        return StudentView(mixed, target, torch.where(mask, valid.roll(1, 0), valid), other, mask)


def check_augment(key: str, augment: nn.Module | None) -> None:
    """Raises a ValueError if ``task.<key>.augment`` moves pixels, and so separates them from their depth."""
    for part in [] if augment is None else augment.modules():
        if isinstance(part, MultiScaleCrop | RandomResizedCrop | HorizontalFlip):
            raise ValueError(
                f"task.{key}.augment={type(part).__name__} moves pixels, but not their depth: use changes of color, "
                "such as ColorJitter, and task.flip for flips."
            )


def flipped(batch: dict, probability: float) -> dict:
    """Flips the columns of random clips of a training batch, and those of their ``depth`` and ``disparity``."""
    if probability == 0:
        return batch
    chosen = torch.rand(len(batch["video"])) < probability
    found = dict(batch)
    for key in ("video", "depth", "disparity"):
        if key in batch:
            flip = chosen.to(batch[key].device).view(-1, *[1] * (batch[key].ndim - 1))
            found[key] = torch.where(flip, batch[key].flip(-1), batch[key])
    return found


def is_video_model(model: nn.Module) -> bool:
    """Returns whether a model predicts whole clips (B, 3, T, H, W), as VideoDepthAnything, and not single images."""
    return hasattr(model, "streams_exactly")


def predict_maps(model: nn.Module, inputs: Tensor) -> Tensor:
    """Predicts float32 maps (B, T, H, W) of normalized clips (B, C, T, H, W); an image model predicts each frame."""
    if is_video_model(model):
        return model(inputs).float()
    return model(inputs.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(inputs), inputs.shape[2])).float()
