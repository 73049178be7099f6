"""Losses of Depth Anything (arXiv 2401.10891, 2406.09414) and Video Depth Anything (arXiv 2501.12375).

Shapes: maps of disparity or depth (B, H, W) float, or clips (B, T, H, W); valid masks bool of the same shape. A map
without valid pixels contributes nothing; if no map has any, the loss is 0, with a gradient of 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.nn.alignment import least_squares_alignment

EPS = 1e-6


def normalized(maps: Tensor, valid: Tensor) -> Tensor:
    """Returns (d - median) / mean |d - median| over the valid pixels of each map (B, H, W), 0 at invalid ones.

    The median of an even number of pixels is the lower of the two middle ones. A constant map becomes 0.
    """
    flat, mask = maps.flatten(1), valid.flatten(1)
    nothing = flat.new_zeros(())
    # sorting is differentiable, and invalid pixels come last
    ordered = torch.where(mask, flat, torch.inf).sort(dim=1).values
    count = mask.sum(1, keepdim=True)
    median = ordered.gather(1, ((count - 1) // 2).clamp(min=0))
    median = torch.where(count > 0, median, nothing)
    centered = torch.where(mask, flat - median, nothing)
    deviation = centered.abs().sum(1, keepdim=True) / count.clamp(min=1)
    return (centered / deviation.clamp(min=EPS)).view_as(maps)


def affine_invariant_loss(predicted: Tensor, target: Tensor, valid: Tensor, trim: float = 0.0) -> Tensor:
    """Mean absolute difference of normalized maps (MiDaS, arXiv 1907.01341), invariant to scale and shift of both.

    Args:
        predicted, target, valid: (B, H, W).
        trim: share of the valid pixels of each map, those of the largest difference, that are ignored.

    Returns:
        Scalar, the mean over maps with valid pixels.

    Raises:
        ValueError: Unless 0 <= ``trim`` < 1, and the shapes are equal.
    """
    _check(predicted, target, valid, 3)
    if not 0 <= trim < 1:
        raise ValueError(f"trim={trim} must be in [0, 1), such as 0.1.")
    difference = (normalized(predicted, valid) - normalized(target, valid)).abs()
    return _mean_of_maps(difference, _without_largest(difference, valid, trim) if trim else valid)


def gradient_matching_loss(predicted: Tensor, target: Tensor, valid: Tensor, scales: int = 4) -> Tensor:
    """Multi-scale gradient matching of MiDaS: absolute differences of the residual of neighboring pixels.

    At scale k, every 2^k-th row and column is used; values are summed over scales. Normalize maps first for invariance.

    Args:
        predicted, target, valid: (B, H, W).
        scales: Number of scales.

    Returns:
        Scalar: per scale, the sum over pairs of valid neighbors divided by the number of valid pixels.

    Raises:
        ValueError: For shapes that differ, or fewer than one scale.
    """
    _check(predicted, target, valid, 3)
    if scales < 1:
        raise ValueError(f"scales={scales} must be at least 1.")
    total = predicted.sum() * 0
    for scale in range(scales):
        step = 2**scale
        mask = valid[:, ::step, ::step]
        residual = torch.where(mask, (predicted - target)[:, ::step, ::step], 0.0)
        pairs = [(residual.diff(dim=dim).abs(), _neighbors(mask, dim)) for dim in (1, 2)]
        total = total + sum((values * both).sum() for values, both in pairs) / mask.sum().clamp(min=1)
    return total


def mixed_pseudo_label_loss(
    predicted: Tensor, first: Tensor, second: Tensor, valid: Tensor, mask: Tensor, trim: float = 0.0
) -> Tensor:
    """Affine-invariant loss of a CutMix image, normalized separately inside and outside the pasted rectangle.

    Args:
        predicted: Prediction of the student on the mixed image (B, H, W).
        first, second: Pseudo-labels of the teacher on the two clean images; ``first`` is used where ``mask`` is true.
        valid: Valid pixels of the labels.
        mask: Bool (B, H, W), the pasted rectangle.
        trim: share of the valid pixels of each region, those of the largest difference, that are ignored.

    Returns:
        Scalar: the losses of the two regions, weighted by their share of the area.
    """
    for label in (first, second):
        _check(predicted, label, valid, 3)
    losses = []
    for region, label in ((mask, first), (~mask, second)):
        inside = valid & region
        difference = (normalized(predicted, inside) - normalized(label, inside)).abs()
        area = region.flatten(1).float().mean(1).to(predicted)
        kept = _without_largest(difference, inside, trim) if trim else inside
        losses.append((_means(difference, kept) * area).mean())
    return losses[0] + losses[1]


def feature_alignment_loss(features: Tensor, frozen: Tensor, tolerance: float = 0.85) -> Tensor:
    """1 - mean cosine similarity of features (B, N, D) to those of a frozen encoder.

    Args:
        features, frozen: (B, N, D).
        tolerance: Tokens of a higher similarity are ignored; the loss is 0 if all are.

    Raises:
        ValueError: For shapes that differ.
    """
    if features.shape != frozen.shape:
        raise ValueError(f"frozen has shape {tuple(frozen.shape)}, but features has {tuple(features.shape)}.")
    similarity = F.cosine_similarity(features, frozen, dim=-1)
    used = similarity <= tolerance
    return torch.where(used, 1 - similarity, 0.0).sum() / used.sum().clamp(min=1)


def silog_loss(predicted: Tensor, target: Tensor, valid: Tensor, variance_focus: float = 0.5) -> Tensor:
    """Scale-invariant logarithmic loss of metric depth: sqrt(mean g² - λ (mean g)²), g = log(predicted / target).

    Args:
        predicted, target: Positive depth of any equal shape.
        valid: Pixels that count.
        variance_focus: λ; 1 for full invariance to scale.

    Raises:
        ValueError: For shapes that differ, or ``variance_focus`` outside [0, 1].
    """
    _check(predicted, target, valid, predicted.ndim)
    if not 0 <= variance_focus <= 1:
        raise ValueError(f"variance_focus={variance_focus} must be in [0, 1].")
    if not valid.any():
        return predicted.sum() * 0
    ratio = predicted[valid].clamp(min=EPS).log() - target[valid].clamp(min=EPS).log()
    # the root has an infinite gradient at 0
    return (ratio.square().mean() - variance_focus * ratio.mean().square()).clamp(min=EPS**2).sqrt()


def temporal_gradient_matching_loss(
    predicted: Tensor, target: Tensor, valid: Tensor, threshold: float = 0.05
) -> Tensor:
    """Mean absolute difference of the changes of clips (B, T, H, W) from frame to frame, after alignment of the clip.

    One least-squares scale and shift aligns each predicted clip to its target. Only pixels with a change of the target
    below ``threshold`` times the range of the target of the clip count: those on static or slowly moving surfaces.

    Args:
        predicted, target, valid: (B, T, H, W).
        threshold: Share of the range.

    Returns:
        Scalar; 0 for clips of one frame.

    Raises:
        ValueError: For shapes that differ, or a threshold that is not positive.
    """
    _check(predicted, target, valid, 4)
    if not threshold > 0:
        raise ValueError(f"threshold={threshold} must be above 0, such as 0.05.")
    scale, shift = least_squares_alignment(predicted.flatten(1), target.flatten(1), valid.flatten(1))
    aligned = scale[:, None, None, None] * predicted + shift[:, None, None, None]
    known = target.masked_fill(~valid, torch.nan).flatten(1)
    span = known.nan_to_num(-torch.inf).amax(1) - known.nan_to_num(torch.inf).amin(1)
    change = target.diff(dim=1)
    used = valid[:, 1:] & valid[:, :-1] & (change.abs() < threshold * span[:, None, None, None])
    difference = torch.where(used, (aligned.diff(dim=1) - change).abs(), 0.0)
    return difference.sum() / used.sum().clamp(min=1)


def _without_largest(difference: Tensor, valid: Tensor, share: float) -> Tensor:
    """Mask without the ``share`` of valid pixels of the largest difference in each map."""
    flat, mask = difference.detach().flatten(1), valid.flatten(1)
    order = torch.where(mask, flat, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    dropped = (share * mask.sum(1, keepdim=True)).long()
    return (mask & (rank >= dropped)).view_as(valid)


def _neighbors(mask: Tensor, dim: int) -> Tensor:
    """Pairs of neighbors along a dimension that are both valid."""
    size = mask.shape[dim]
    return mask.narrow(dim, 1, max(0, size - 1)) & mask.narrow(dim, 0, max(0, size - 1))


def _means(values: Tensor, valid: Tensor) -> Tensor:
    """Means (B,) over valid pixels; 0 for maps without any."""
    kept = torch.where(valid, values, 0.0).flatten(1).sum(1)
    return kept / valid.flatten(1).sum(1).clamp(min=1)


def _mean_of_maps(values: Tensor, valid: Tensor) -> Tensor:
    return _means(values, valid).sum() / valid.flatten(1).any(1).sum().clamp(min=1)


def _check(predicted: Tensor, target: Tensor, valid: Tensor, dims: int) -> None:
    shapes = [tuple(each.shape) for each in (predicted, target, valid)]
    if predicted.ndim != dims or len(set(shapes)) > 1:
        expected = "(B, H, W)" if dims == 3 else "(B, T, H, W)" if dims == 4 else "of equal shape"
        raise ValueError(f"predicted, target and valid have shapes {shapes}: they must be {expected}, all equal.")
    if valid.dtype != torch.bool:
        raise ValueError(f"valid is {valid.dtype}: it must be a bool mask, such as target > 0.")
