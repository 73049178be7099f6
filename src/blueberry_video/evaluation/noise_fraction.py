"""Noise fraction, sigma / (alpha + sigma), of noisy latents alpha * clean + sigma * noise: a noise level in one unit
for all objectives.

For flow matching it equals the timestep, so losses of other objectives are reported in the unit of a flow. At the same
noise fraction, the velocity of one objective determines that of another, and the flow's squared error is the squared
error times :func:`flow_error_factor`.
"""

import torch
from torch import Tensor

from blueberry_video.diffusion.objectives import Objective, VPrediction


def timesteps_at_noise_fraction(objective: Objective, fraction: Tensor, resolution: int = 1000) -> Tensor:
    """Returns the timesteps at which an objective has the given noise fractions.

    Args:
        objective: for flow matching, and objectives without a noise fraction, timesteps equal the fractions.
        fraction: any shape, in [0, 1]; values that the objective does not reach map to the nearest that it does.
        resolution: number of steps of the lookup table.

    Returns:
        float32 in [0, 1], snapped to the timesteps of the objective.
    """
    if not isinstance(objective, VPrediction):
        return fraction
    grid = objective.snap(torch.linspace(0, 1, resolution + 1, dtype=torch.float32, device=fraction.device))
    alpha, sigma = objective.alpha_sigma(grid)
    known = sigma / (alpha + sigma)
    above = torch.searchsorted(known, fraction.contiguous()).clamp(1, resolution)
    is_nearer = fraction - known[above - 1] < known[above] - fraction
    # fraction 0, the clean latent, is not trained on: its nearest is the first timestep
    return grid[torch.where(is_nearer, above - 1, above).clamp(min=1)]


def flow_error_factor(objective: Objective, t: Tensor) -> Tensor:
    """Returns the factor from the squared error of an objective's velocity to that of a flow's velocity, noise - clean.

    It is (alpha + sigma)² where alpha² + sigma² = 1, and 1 for a flow; same shape as ``t``.
    """
    if not isinstance(objective, VPrediction):
        return torch.ones_like(t)
    alpha, sigma = objective.alpha_sigma(t)
    return (alpha + sigma).square()
