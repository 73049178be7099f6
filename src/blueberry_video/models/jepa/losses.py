"""Losses of embeddings: how well hidden ones are predicted, and what keeps them from becoming all alike."""

import torch
import torch.nn.functional as F
from torch import Tensor


def latent_loss(predicted: Tensor, latents: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean absolute error of embeddings (B, K, D) in 32 bits at least, each token times its ``weight`` (B, K) where
    there is one: the loss of V-JEPA (arXiv 2404.08471).
    """
    error = (predicted.to(_wide(predicted)) - latents).abs()
    return error.mean() if weight is None else (error * weight.unsqueeze(-1)).mean()


def context_weight(keep: Tensor, target: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """What a visible token counts in the loss of V-JEPA 2.1 (arXiv 2603.14482): 1 / sqrt(distance to the nearest hidden
    one).

    Args:
        keep: (B, K) indices of the visible tokens.
        target: (B, N_target) indices of the hidden ones.
        grid: number of tokens along (t, h, w): the distance is Euclidean in it.

    Returns:
        (B, K): 1 beside a hidden token, less further away.
    """
    places = torch.cartesian_prod(*(torch.arange(n, device=keep.device) for n in grid)).float()  # (N, 3)
    return torch.cdist(places[keep], places[target]).amin(dim=2).rsqrt()


def sigreg(embeddings: Tensor, directions: Tensor, knots: int = 17, reach: float = 3.0) -> Tensor:
    """How far embeddings are from an isotropic standard normal distribution (SIGReg of LeJEPA, arXiv 2511.08544): the
    Epps–Pulley statistic of their projections, mean over directions.

    The characteristic function of each projection, at points t between 0 and ``reach``, is compared with that of the
    standard normal, exp(-t² / 2), which is also the weight of the squared difference; the integral is the trapezoid
    rule's. Where all N embeddings are equal it grows as N; for standard normal ones it is about 1.05, whatever N is.

    Args:
        embeddings: (…, N, D): N samples of each of the leading distributions, over which the mean is taken.
        directions: (D, K), of any length, that the embeddings are projected on; normal random numbers, drawn anew for
            every step, look at all of them in time.
        knots: points of the trapezoid rule, 2 or more.
        reach: the last of them.

    Returns:
        A scalar, 0 or more, in 32 bits at least.
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
