"""Denoising loss by noise fraction, with the captions of the clips and with shuffled captions.

A mean over all noise fractions hides text conditioning: where the latents are still visible, a network that ignores
its text reaches the same loss as one that uses it. The range [0.95, 1], where only the text determines the clip, is
therefore measured separately.

Shapes: B clips, C channels, T x H x W latent frames, rows and columns.
"""

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blueberry_video.diffusion.objectives import FlowMatching, Objective, VPrediction
from blueberry_video.evaluation.noise_fraction import flow_error_factor, timesteps_at_noise_fraction
from blueberry_video.evaluation.trivial import trivial_denoising_losses
from blueberry_video.models.text_encoder.base import TextTokens
from blueberry_video.nn.noise import clip_generators, standard_normal

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
    average: Tensor | None = None,
) -> dict[str, Tensor]:
    """Returns mean squared errors of a denoiser, as means over clips.

    Every clip is denoised at ten noise fractions, one in each tenth of [0, 1], and at one in [0.95, 1].

    Args:
        denoise: maps noisy latents (B, C, T, H, W), timesteps (B,) in [0, 1] and text to the network output.
        objective: training objective of the network.
        clean: latents (B, C, T, H, W).
        text: captions of the clips.
        shuffled_text: a different caption for each clip, or ``None`` if there is none.
        generator: one CPU generator per clip: noise and noise fractions of a clip then depend on its seed only. One
            generator draws the seed of each clip.
        average: mean latents (C, T, H, W) of the baseline; ``None`` for those of the batch.

    Returns:
        Scalars by name. ``loss`` is the mean over noise fractions in [0, 1] (flow timesteps), ``loss_t00_10`` …
        ``loss_t90_100`` over each tenth, ``loss_t95`` over [0.95, 1]. ``loss_shuffled`` and ``loss_t95_shuffled`` use
        ``shuffled_text`` and the same noise. ``loss_trivial`` and ``loss_t95_trivial`` are of ``average`` in place of a
        network; without ``average`` and for B = 1, where the mean is the clip itself, of zero, the mean of normalized
        latents. For v-prediction, ``flow_loss…`` are all of these in the unit of a flow's velocity.
    """
    if isinstance(generator, torch.Generator):
        generator = clip_generators(generator, len(clean))
    if average is None:
        average = clean.mean(dim=0) if len(clean) > 1 else torch.zeros_like(clean[0])
    drawn = [zlib.crc32(f"noise fraction {each.initial_seed()}".encode()) / 2**32 for each in generator]
    offset = torch.tensor(drawn, device=clean.device)  # (B,), in [0, 1)
    # the offsets alternate, so that their mean over a set hardly changes the mean noise fraction
    batches = [(i + (1 - offset if i % 2 else offset)) / NUM_BINS for i in range(NUM_BINS)]
    batches.append(NEAR_PURE_NOISE + (1 - NEAR_PURE_NOISE) * offset)
    rows = [
        _errors(denoise, objective, clean, text, shuffled_text, fraction, generator, average) for fraction in batches
    ]
    units = ("loss", "flow_loss") if isinstance(objective, VPrediction) else ("loss",)
    values: dict[str, Tensor] = {}
    for unit in units:
        for name in ("", "_trivial") if shuffled_text is None else ("", "_shuffled", "_trivial"):
            bins = [row[f"{unit}{name}"].mean() for row in rows[:-1]]
            values[f"{unit}{name}"] = torch.stack(bins).mean()
            values[f"{unit}_t95{name}"] = rows[-1][f"{unit}{name}"].mean()
            for i, value in enumerate(() if name else bins):
                values[f"{unit}_t{10 * i:02d}_{10 * (i + 1):02d}"] = value
    return values


def _errors(
    denoise: Denoiser,
    objective: Objective,
    clean: Tensor,
    text: TextTokens,
    shuffled_text: TextTokens | None,
    fraction: Tensor,
    generator: Sequence[torch.Generator],
    average: Tensor,
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
        constants = trivial_denoising_losses(unit_objective, clean, noise, timesteps, average)
        values[f"{unit}_trivial"] = constants["mean"].expand(len(clean))
    return values
