"""A scale of time that objectives have in common: the share of noise among the two levels of a noisy latent,
noise / (signal + noise). Of a flow it is the time itself; so losses of other objectives can be told in a flow's unit.

With x = signal * clean + noise_level * noise known, whoever says the velocity of one objective says that of every other
with the same share, and the flow's error is the error divided by the factor that the levels have: see
:func:`flow_error_factor`.
"""

import torch
from torch import Tensor

from blueberry_video.diffusion.objectives import Objective, VPrediction


def times_of_shares(objective: Objective, share: Tensor, resolution: int = 1000) -> Tensor:
    """The times at which an objective has these shares of noise.

    Args:
        objective: of a flow, and of what has no share of its own, the times are the shares.
        share: any shape, in [0, 1]; a share that the objective does not have is taken to be its nearest.
        resolution: steps into which time is cut to look it up; between them it is linear.

    Returns:
        float32 in [0, 1], snapped to the times that the objective tells apart.
    """
    if not isinstance(objective, VPrediction):
        return share
    grid = objective.snap(torch.linspace(0, 1, resolution + 1, dtype=torch.float32, device=share.device))
    signal, noise = objective.levels(grid)
    known = noise / (signal + noise)
    above = torch.searchsorted(known, share.contiguous()).clamp(1, resolution)
    is_nearer = share - known[above - 1] < known[above] - share
    # the clean latent itself, share 0, is not trained on: the first step is the nearest that is
    return grid[torch.where(is_nearer, above - 1, above).clamp(min=1)]


def flow_error_factor(objective: Objective, t: Tensor) -> Tensor:
    """What the squared error of an objective's velocity is multiplied by to be that of a flow's velocity, noise -
    clean, which follows from it: (signal + noise)² where signal² + noise² = 1, and 1 for a flow. Shape of ``t``.
    """
    if not isinstance(objective, VPrediction):
        return torch.ones_like(t)
    signal, noise = objective.levels(t)
    return (signal + noise).square()
