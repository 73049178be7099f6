"""Denoising loss by noise fraction, with the captions of the clips and with shuffled captions.

A mean over all noise fractions hides text conditioning: where the latents are still visible, a network that ignores
its text reaches the same loss as one that uses it. The range [0.95, 1], where only the text determines the clip, is
therefore measured separately.

Shapes: B clips, C channels, T x H x W latent frames, rows and columns.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blueberry_video.diffusion.objectives import FlowMatching, Objective, VPrediction
from blueberry_video.evaluation.noise_fraction import flow_error_factor, timesteps_at_noise_fraction
from blueberry_video.evaluation.trivial import trivial_denoising_losses
from blueberry_video.models.text_encoder.base import TextTokens
from blueberry_video.nn.noise import standard_normal

NUM_BINS = 10
NEAR_PURE_NOISE = 0.95  # noise fraction above which only the text determines the clip

Denoiser = Callable[[Tensor, Tensor, TextTokens], Tensor]  # (noisy latents, timesteps (B,), text) -> output


def denoising_losses(
    denoise: Denoiser,
    objective: Objective,
    clean: Tensor,
    text: TextTokens,
    shuffled_text: TextTokens | None,
    generator: torch.Generator | Sequence[torch.Generator],
) -> dict[str, Tensor]:
    """Returns mean squared errors of a denoiser.

    Args:
        denoise: maps noisy latents (B, C, T, H, W), timesteps (B,) in [0, 1] and text to the network output.
        objective: training objective of the network.
        clean: latents (B, C, T, H, W).
        text: captions of the clips.
        shuffled_text: a different caption for each clip, or ``None`` if there is none.
        generator: CPU generator of noise and timesteps, or one per clip. Timesteps are evenly spaced over the
            batch; the seed of the first clip determines their order.

    Returns:
        Scalars by name. ``loss`` is the mean over evenly spaced noise fractions in [0, 1] (flow timesteps),
        ``loss_t00_10`` … ``loss_t90_100`` over each tenth, ``loss_t95`` over [0.95, 1]. ``loss_shuffled`` and
        ``loss_t95_shuffled`` use ``shuffled_text`` and the same noise. ``loss_trivial`` and ``loss_t95_trivial`` are
        of the mean of the clips in place of a network; for B = 1, where the mean is the clip itself, of zero, the mean
        of normalized latents. For v-prediction, ``flow_loss…`` are all of these in the unit of a flow's velocity.
    """
    rounds = math.ceil(NUM_BINS / len(clean))  # a batch fills every bin
    first = generator
    if not isinstance(first, torch.Generator):  # the noise of the first clip does not depend on its position
        first = torch.Generator().manual_seed(first[0].initial_seed())
    order = torch.randperm(rounds * len(clean), generator=first)
    fractions = ((order + 0.5) / len(order)).to(clean.device)
    batches = [*fractions.split(len(clean)), NEAR_PURE_NOISE + (1 - NEAR_PURE_NOISE) * fractions[: len(clean)]]
    rows = [_errors(denoise, objective, clean, text, shuffled_text, fraction, generator) for fraction in batches]
    units = ("loss", "flow_loss") if isinstance(objective, VPrediction) else ("loss",)
    values: dict[str, Tensor] = {}
    for unit in units:
        for name in ("", "_trivial") if shuffled_text is None else ("", "_shuffled", "_trivial"):
            even = torch.cat([row[f"{unit}{name}"] for row in rows[:-1]])
            values[f"{unit}{name}"] = even.mean()
            values[f"{unit}_t95{name}"] = rows[-1][f"{unit}{name}"].mean()
            for i in range(NUM_BINS if not name else 0):
                values[f"{unit}_t{10 * i:02d}_{10 * (i + 1):02d}"] = even[(fractions * NUM_BINS).long() == i].mean()
    return values


def _errors(
    denoise: Denoiser,
    objective: Objective,
    clean: Tensor,
    text: TextTokens,
    shuffled_text: TextTokens | None,
    fraction: Tensor,
    generator: torch.Generator | Sequence[torch.Generator],
) -> dict[str, Tensor]:
    """Returns mean squared errors by name, (B,) each, at noise fractions ``fraction`` (B,) with new noise."""
    t = timesteps_at_noise_fraction(objective, fraction)
    noise = standard_normal(clean.shape, generator, clean.device)
    noisy, target = objective.noisy(clean, noise, t), objective.target(clean, noise, t)
    factor = flow_error_factor(objective, t)
    values: dict[str, Tensor] = {}
    for name, condition in (("", text), ("_shuffled", shuffled_text)):
        if condition is None:
            continue
        error = (denoise(noisy, t, condition).float() - target).square().flatten(1).mean(dim=1)
        values |= {f"loss{name}": error, f"flow_loss{name}": error * factor}
    for unit, unit_objective, timesteps in (("loss", objective, t), ("flow_loss", FlowMatching(), fraction)):
        constants = trivial_denoising_losses(unit_objective, clean, noise, timesteps)
        values[f"{unit}_trivial"] = constants["mean" if len(clean) > 1 else "zero"].expand(len(clean))
    return values
