"""Metrics of depth: AbsRel, δ1, RMSE, temporal alignment error and flicker.

Shapes: clips of maps (B, T, H, W) float; an image is a clip with T = 1. Depth is in meters, 0 or not finite where it is
invalid. Every metric is a vector with one value per clip, NaN for a clip without a pixel to measure, so that means over
a set do not depend on its batches. Maps keep their dtype: float64 in, float64 out.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from blueberry_video.nn.alignment import least_squares_alignment

MIN_DISPARITY = 1e-3  # of the published evaluation: 1 / (1000 m)


class Accuracy(NamedTuple):
    """Accuracy of depth, (B,) each: ``abs_rel``, ``delta1`` (share in [0, 1]) and ``rmse`` (m)."""

    abs_rel: Tensor
    delta1: Tensor
    rmse: Tensor


def valid_depth(depth: Tensor) -> Tensor:
    """Returns the mask of the finite and positive values."""
    return depth.isfinite() & (depth > 0)


def disparity_of(depth: Tensor) -> Tensor:
    """Returns 1 / depth, 0 where depth is invalid."""
    valid = valid_depth(depth)
    return torch.where(valid, 1 / torch.where(valid, depth, 1.0), 0.0)


def aligned_depth(disparity: Tensor, depth: Tensor, max_depth: float | None = None, by_image: bool = False) -> Tensor:
    """Depth of a predicted affine-invariant disparity, aligned to the ground truth.

    The protocol of MiDaS, Depth Anything and Video Depth Anything: a least-squares scale and shift fit the prediction
    to the disparity of the ground truth; the result is clamped and inverted. The fit is computed in float64.

    Args:
        disparity: prediction (B, T, H, W), larger for nearer pixels.
        depth: ground truth (B, T, H, W) in meters. Clips without valid pixels are not aligned.
        max_depth: largest depth in meters; the aligned disparity is clamped to at least 1 / ``max_depth``. ``None``:
            1000 m, as in the published evaluation.
        by_image: one scale and shift for each frame, instead of one for the clip.

    Returns:
        Depth (B, T, H, W) in meters.

    Raises:
        ValueError: for shapes that differ, or a ``max_depth`` that is not positive.
    """
    _check_maps(disparity, depth)
    if max_depth is not None and not max_depth > 0:
        raise ValueError(f"max_depth={max_depth} must be above 0, in meters, such as 80, or null.")
    least = MIN_DISPARITY if max_depth is None else 1 / max_depth
    first = 0 if by_image else 1  # of the dimensions that share a fit
    predicted, target = (maps.double().flatten(0, 1 - first).flatten(1) for maps in (disparity, disparity_of(depth)))
    mask = valid_depth(depth).flatten(0, 1 - first).flatten(1) & predicted.isfinite()
    scale, shift = least_squares_alignment(predicted, target, mask)
    aligned = scale[:, None] * predicted + shift[:, None]
    return (1 / aligned.clamp(min=least)).view_as(disparity).to(disparity.dtype)


def depth_accuracy(predicted: Tensor, depth: Tensor) -> Accuracy:
    """AbsRel, δ1 and RMSE over the valid pixels of each clip.

    AbsRel is the mean of |p - d| / d; δ1 the share of pixels with max(p / d, d / p) < 1.25; RMSE the root of the mean
    squared difference over the clip, in meters.

    Args:
        predicted: depth (B, T, H, W) in meters, positive; see :func:`aligned_depth` for disparity.
        depth: ground truth (B, T, H, W).

    Raises:
        ValueError: for shapes that differ.
    """
    _check_maps(predicted, depth)
    valid = valid_depth(depth)
    truth = torch.where(valid, depth, 1.0)
    positive = predicted.clamp(min=torch.finfo(predicted.dtype).tiny)
    ratio = torch.maximum(positive / truth, truth / positive)
    return Accuracy(
        _clip_means((predicted - truth).abs() / truth, valid),
        _clip_means((ratio < 1.25).to(predicted), valid),
        _clip_means((predicted - truth).square(), valid).sqrt(),
    )


def temporal_alignment_error(
    predicted: Tensor, depth: Tensor, intrinsics: Tensor, poses: Tensor, occlusion_tolerance: float | None = None
) -> Tensor:
    """Temporal alignment error (TAE) of Video Depth Anything (arXiv 2501.12375), in percent.

    The depth of each frame is projected into the next frame, and that of the next into the frame, with the camera
    poses; the error is the AbsRel to the predicted depth of the nearest pixel there, times 100. It is averaged over
    pixels, then over all pairs in both directions. Pixels count if the ground truth is valid at both ends and the
    projection lies in the image.

    The ground truth has an error too, its floor: ``temporal_alignment_error(depth, depth, …)``. It comes from the
    nearest pixel, from surfaces that one frame does not show, and from moving objects; with ``occlusion_tolerance``
    only from the nearest pixel.

    Args:
        predicted: depth (B, T, H, W) in meters.
        depth: ground truth (B, T, H, W) in meters.
        intrinsics: camera matrix (B, 3, 3) in pixels; the center of the pixel in row i and column j is at
            (j + 0.5, i + 0.5).
        poses: camera-to-world matrices (B, T, 4, 4), OpenCV axes, in meters.
        occlusion_tolerance: pixels with a larger relative error of the projected ground truth are ignored, such as
            0.05; ``None`` keeps them, as published.

    Returns:
        (B,) in percent; NaN for clips of one frame.

    Raises:
        ValueError: for shapes that differ.
    """
    _check_maps(predicted, depth)
    size, frames = predicted.shape[0], predicted.shape[1]
    if intrinsics.shape != (size, 3, 3) or poses.shape != (size, frames, 4, 4):
        raise ValueError(
            f"intrinsics has shape {tuple(intrinsics.shape)} and poses {tuple(poses.shape)}: they must be "
            f"{(size, 3, 3)} and {(size, frames, 4, 4)}."
        )
    if frames < 2:
        return predicted.new_full((size,), torch.nan)
    errors = []
    for t in range(frames - 1):
        for source, other in ((t, t + 1), (t + 1, t)):
            move = torch.linalg.inv(poses[:, other].double()) @ poses[:, source].double()
            used = valid_depth(depth[:, source])
            if occlusion_tolerance is not None:
                error, seen = _reprojection_error(depth[:, source], depth[:, other], intrinsics, move)
                used = used & seen & (error <= occlusion_tolerance)
            error, seen = _reprojection_error(
                predicted[:, source], predicted[:, other], intrinsics, move, valid_depth(depth[:, other])
            )
            errors.append(_clip_means(error, used & seen))
    return 100 * torch.stack(errors).nanmean(dim=0)


def flicker(predicted: Tensor, depth: Tensor, static: float = 0.02) -> Tensor:
    """Change of the predicted depth from frame to frame where that of the ground truth is nearly constant, in percent.

    Mean of |Δp - Δd| / d over pixels with |Δd| / d < ``static``, where Δ is the change to the next frame. The change
    of the ground truth is subtracted with its sign, pixel by pixel: a difference of two mean absolute changes can be 0
    for a prediction that flickers and misses the true changes. It needs no poses, and is 0 for the ground truth.

    Args:
        predicted: depth (B, T, H, W) in meters, aligned once for the clip.
        depth: ground truth (B, T, H, W) in meters.
        static: largest relative change of the ground truth.

    Returns:
        (B,) in percent; NaN for clips of one frame.

    Raises:
        ValueError: for shapes that differ, or a ``static`` that is not positive.
    """
    _check_maps(predicted, depth)
    if not static > 0:
        raise ValueError(f"static={static} must be above 0, a relative change such as 0.02.")
    valid = valid_depth(depth)
    both = valid[:, 1:] & valid[:, :-1]
    truth = torch.where(valid, depth, 1.0)
    change = truth.diff(dim=1)
    used = both & (change.abs() < static * truth[:, :-1])
    return 100 * _clip_means((predicted.diff(dim=1) - change).abs() / truth[:, :-1], used)


def _reprojection_error(
    source: Tensor, other: Tensor, intrinsics: Tensor, move: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Relative error of depth (B, H, W) projected into a different frame, and the mask of pixels that land in it.

    Args:
        source, other: depth of the two frames.
        intrinsics: (B, 3, 3).
        move: float64 (B, 4, 4), from the camera of ``source`` to that of ``other``.
        valid: pixels of ``other`` that count; ``None``: those with valid depth.
    """
    height, width = source.shape[-2:]
    rows, columns = (torch.arange(n, device=source.device, dtype=torch.float64) + 0.5 for n in (height, width))
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)])
    rays = torch.linalg.inv(intrinsics.double()) @ pixels.flatten(1)  # (B, 3, H W)
    points = move[:, :3, :3] @ (rays * source.double().flatten(1)[:, None]) + move[:, :3, 3:]
    projected = intrinsics.double() @ points
    z = points[:, 2]
    ahead = z > 0
    u, v = (projected[:, axis] / torch.where(ahead, projected[:, 2], 1.0) for axis in (0, 1))
    inside = ahead & (u >= 0) & (u < width) & (v >= 0) & (v < height)  # False for NaN
    index = torch.where(inside, v.floor() * width + u.floor(), 0.0).long()
    there = other.double().flatten(1).gather(1, index)
    known = (valid_depth(other) if valid is None else valid & valid_depth(other)).flatten(1).gather(1, index)
    seen = inside & known
    error = torch.where(seen, (z - there).abs() / torch.where(seen, there, 1.0), 0.0)
    return error.view_as(source).to(source.dtype), seen.view_as(source)


def _clip_means(values: Tensor, valid: Tensor) -> Tensor:
    """Means (B,) over the valid pixels of each clip; NaN without any."""
    kept = torch.where(valid, values, 0.0).flatten(1).sum(1)
    return kept / valid.flatten(1).sum(1)


def _check_maps(predicted: Tensor, depth: Tensor) -> None:
    if predicted.ndim != 4 or predicted.shape != depth.shape:
        raise ValueError(
            f"the prediction has shape {tuple(predicted.shape)} and the ground truth {tuple(depth.shape)}: both must "
            "be (B, T, H, W)."
        )
