"""Weighted losses of the task of depth."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blueberry_video.models.depth_anything.losses import (
    affine_invariant_loss,
    feature_alignment_loss,
    gradient_matching_loss,
    mixed_pseudo_label_loss,
    normalized,
    silog_loss,
    temporal_gradient_matching_loss,
)
from blueberry_video.models.dinov2 import DINOv2
from blueberry_video.tasks.depth_student import StudentView


@dataclass(frozen=True)
class RelativeLoss:
    """Weights of the losses of affine-invariant disparity.

    Args:
        affine: weight of the affine-invariant loss of each frame.
        gradient: of gradient matching of each frame; 2 in Depth Anything V2, 0.5 in Video Depth Anything, 0 in V1.
        temporal: of temporal gradient matching of labelled clips; 10 in Video Depth Anything.
        features: of the alignment of features to the frozen initial encoder, for pseudo-labelled images; 1 in V1.
        scales: number of scales of gradient matching.
        trim: share of the pixels of the largest affine-invariant loss that are ignored; 0.1 in V2.
        threshold: of :func:`~blueberry_video.models.depth_anything.losses.temporal_gradient_matching_loss`.
        tolerance: features of a higher cosine similarity are ignored.
        average: divide the sum by the sum of the weights of the terms that a batch has, as V1.

    Raises:
        ValueError: a negative weight, or all of them 0.
    """

    affine: float = 1.0
    gradient: float = 2.0
    temporal: float = 0.0
    features: float = 0.0
    scales: int = 4
    trim: float = 0.1
    threshold: float = 0.05
    tolerance: float = 0.85
    average: bool = False

    def __post_init__(self) -> None:
        weights = {key: getattr(self, key) for key in ("affine", "gradient", "temporal", "features")}
        if wrong := [f"task.loss.{key}={value}" for key, value in weights.items() if value < 0]:
            raise ValueError(f"{wrong[0]} must be at least 0.")
        if not self.affine + self.gradient:
            raise ValueError("task.loss.affine=0 and task.loss.gradient=0: set one of them above 0, such as affine=1.")

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Returns the weighted sum of terms by name or, with ``average``, their weighted mean."""
        weights = {name: getattr(self, name) for name in terms}
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return loss / max(sum(weights.values()), 1e-12) if self.average else loss

    def supervised(self, maps: Tensor, target: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Terms of clips of disparity (B, T, H, W), by name; without those of weight 0."""
        terms = self._by_frame(maps, target, valid)
        if self.temporal and maps.shape[1] > 1:
            # of targets from 0 to 1, as published, so that the weight does not depend on the unit of depth
            terms["temporal"] = temporal_gradient_matching_loss(
                maps, _to_unit_range(target, valid), valid, self.threshold
            )
        return terms

    def pseudo(self, maps: Tensor, view: StudentView) -> dict[str, Tensor]:
        """Terms of pseudo-labelled clips, normalized separately inside and outside the pasted boxes."""
        if view.pasted is None:
            return self._by_frame(maps, view.target, view.valid)
        assert view.mask is not None
        predicted, inner, outer, mask = (each.flatten(0, 1) for each in (maps, view.pasted, view.target, view.mask))
        valid, terms = view.valid.flatten(0, 1), {}
        if self.affine:
            terms["affine"] = mixed_pseudo_label_loss(predicted, inner, outer, valid, mask, self.trim)
        if self.gradient:
            losses = []
            for region, label in ((mask, inner), (~mask, outer)):
                inside = valid & region
                pair = (normalized(predicted, inside), normalized(label, inside))
                losses.append(gradient_matching_loss(*pair, inside, self.scales) * region.to(maps).mean())
            terms["gradient"] = losses[0] + losses[1]
        return terms

    def alignment(self, tokens: Tensor, frozen: DINOv2, images: Tensor, layer: int) -> Tensor:
        """Alignment of tokens (N, prefix + S, D) of a layer to those of a frozen encoder of images (N, C, 1, H, W)."""
        with torch.no_grad():
            target = frozen.tokens_behind(images, (layer,))[0][0]
        patches = tokens[:, -target.shape[1] :]  # without the class token and registers
        return feature_alignment_loss(patches, target, self.tolerance)

    def _by_frame(self, maps: Tensor, target: Tensor, valid: Tensor) -> dict[str, Tensor]:
        predicted, truth, mask = (each.flatten(0, 1) for each in (maps, target, valid))
        terms = {}
        if self.affine:
            terms["affine"] = affine_invariant_loss(predicted, truth, mask, self.trim)
        if self.gradient:
            pair = (normalized(predicted, mask), normalized(truth, mask))
            terms["gradient"] = gradient_matching_loss(*pair, mask, self.scales)
        return terms


def _to_unit_range(target: Tensor, valid: Tensor) -> Tensor:
    """Maps the valid values of each clip (B, T, H, W) to [0, 1]; a constant clip becomes 0."""
    low = torch.where(valid, target, torch.inf).flatten(1).amin(1)[:, None, None, None]
    high = torch.where(valid, target, -torch.inf).flatten(1).amax(1)[:, None, None, None]
    span = (high - low).clamp(min=torch.finfo(target.dtype).tiny)  # infinite without valid pixels, which are not used
    return torch.where(valid, (target - low) / span, 0.0)


class MetricLoss:
    """SiLog of metric depth."""

    def supervised(self, maps: Tensor, target: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """``silog`` over all valid pixels of depth (B, T, H, W) in meters."""
        return {"silog": silog_loss(maps, target, valid)}

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Returns ``silog``."""
        return terms["silog"]


@contextmanager
def captured(module: nn.Module) -> Iterator[list[Tensor]]:
    """Context manager that collects the outputs of a module."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
