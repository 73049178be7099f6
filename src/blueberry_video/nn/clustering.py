"""Nearest centers and k-means."""

import torch
from torch import Tensor

_ROWS = 8192  # vectors compared with the centers at once


def nearest(vectors: Tensor, centers: Tensor) -> Tensor:
    """Returns the indices, long (N,), of the centers (K, D) nearest to vectors (N, D)."""
    centers = centers.to(vectors.dtype)
    squares = centers.square().sum(dim=1)
    with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
        return torch.cat([(squares - 2 * rows @ centers.T).argmin(dim=1) for rows in vectors.split(_ROWS)])


@torch.no_grad()
def kmeans(vectors: Tensor, centers: Tensor, iterations: int = 10) -> Tensor:
    """Lloyd's algorithm: moves centers (K, D) to the means of their vectors (N, D); centers without any do not move."""
    for _ in range(iterations):
        rows = nearest(vectors, centers)
        found = torch.bincount(rows, minlength=len(centers))
        total = torch.zeros_like(centers).index_add_(0, rows, vectors.to(centers.dtype))
        centers = torch.where(found[:, None] > 0, total / found.clamp(min=1)[:, None], centers)
    return centers
