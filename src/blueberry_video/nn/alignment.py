"""Alignment of affine-invariant maps, such as predicted disparity."""

import torch
from torch import Tensor


def least_squares_alignment(predicted: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift (B,) that minimize the squared error of scale * predicted + shift over valid pixels (B, N).

    Scale 1 and shift 0 without valid pixels; scale 0 and the mean of the target for a constant prediction.
    """
    weight = valid.to(predicted)
    predicted, target = torch.where(valid, predicted, 0.0), torch.where(valid, target, 0.0)
    count = weight.sum(1)
    divisor = count.clamp(min=1)
    mean_p, mean_t = predicted.sum(1) / divisor, target.sum(1) / divisor
    centered = (predicted - mean_p[:, None]) * weight
    variance = centered.square().sum(1)
    covariance = (centered * (target - mean_t[:, None])).sum(1)
    tiny = torch.finfo(predicted.dtype).eps * predicted.square().sum(1)
    scale = torch.where(variance > tiny, covariance / variance.clamp(min=torch.finfo(predicted.dtype).tiny), 0.0)
    found = count > 0
    return torch.where(found, scale, 1.0), torch.where(found, mean_t - scale * mean_p, 0.0)
