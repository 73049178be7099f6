"""Losses on embeddings: prediction of hidden tokens, and a regularizer that prevents collapse."""

import torch
import torch.nn.functional as F
from torch import Tensor


def latent_loss(predicted: Tensor, latents: Tensor, weight: Tensor | None = None, exponent: float = 1.0) -> Tensor:
    """Mean error of embeddings (B, K, D), |difference| ** ``exponent`` / ``exponent``, in float32 or wider.

    V-JEPA and V-JEPA 2 train with the exponent 1, the mean absolute error. ``weight`` (B, K) multiplies the error of
    each token.
    """
    error = (predicted.to(_wide(predicted)) - latents).abs()
    if exponent != 1:
        error = error.pow(exponent) / exponent
    return error.mean() if weight is None else (error * weight.unsqueeze(-1)).mean()


def context_weight(keep: Tensor, target: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Loss weight of each visible token in V-JEPA 2.1 (arXiv 2603.14482): 1 / sqrt(distance to the nearest hidden one).

    Args:
        keep: (B, K) indices of the visible tokens.
        target: (B, N_target) indices of the hidden tokens.
        grid: patch grid (t, h, w), in which the distance is Euclidean.

    Returns:
        (B, K): 1 next to a hidden token, less at greater distance.
    """
    positions = torch.cartesian_prod(*(torch.arange(n, device=keep.device) for n in grid)).float()  # (N, 3)
    return torch.cdist(positions[keep], positions[target]).amin(dim=2).rsqrt()


def sigreg(embeddings: Tensor, directions: Tensor, knots: int = 17, reach: float = 3.0) -> Tensor:
    """Distance of embeddings from an isotropic standard normal distribution (SIGReg of LeJEPA, arXiv 2511.08544): the
    mean Epps–Pulley statistic of their projections.

    The characteristic function of each projection, at points t in [0, ``reach``], is compared with that of the
    standard normal, exp(-t² / 2), which also weights the squared difference; the integral uses the trapezoid rule. For
    N equal embeddings the statistic grows as N; for standard normal ones it is about 1.05 for any N.

    Args:
        embeddings: (…, N, D): N samples of each distribution; the result is the mean over the leading dimensions.
        directions: (D, K) of any length, on which the embeddings are projected; normal random numbers, drawn again at
            every step, cover all directions over time.
        knots: number of points of the trapezoid rule, at least 2.
        reach: the largest of these points.

    Returns:
        A nonnegative scalar, in float32 or wider.
    """
    points = torch.linspace(0, reach, knots, device=embeddings.device, dtype=_wide(embeddings))
    normal = (-points.square() / 2).exp()
    weights = 2 * reach / (knots - 1) * normal
    weights[0], weights[-1] = weights[0] / 2, weights[-1] / 2
    with torch.autocast(embeddings.device.type, enabled=False):
        projected = embeddings.to(points.dtype) @ F.normalize(directions.to(points.dtype), dim=0)  # (…, N, K)
    angles = projected.unsqueeze(-1) * points  # (…, N, K, knots)
    difference = (angles.cos().mean(-3) - normal).square() + angles.sin().mean(-3).square()
    return embeddings.shape[-2] * (difference * weights).sum(-1).mean()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
