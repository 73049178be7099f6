"""The loss of a denoiser by the share of noise, with its own captions and with those of other clips.

A mean over all noise hides what matters: a network that ignores its text does as well as any where the latents can
still be seen, and makes what it likes of pure noise. So the last twentieth, where only the text tells, is measured by
itself.

Letters: B clips, C channels, T H W frames, rows and columns of latents.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from blueberry_video.diffusion.objectives import FlowMatching, Objective, VPrediction
from blueberry_video.evaluation.trivial import trivial_denoising_losses
from blueberry_video.models.text_encoder.base import TextTokens
from blueberry_video.nn.noise import standard_normal
from blueberry_video.nn.noise_share import flow_error_factor, times_of_shares

NUM_BINS = 10
PURE = 0.95  # from here on nothing but the text tells what a clip shows

Ask = Callable[[Tensor, Tensor, TextTokens], Tensor]  # noisy latents, times (B,) and text -> output


def denoising_losses(
    ask: Ask,
    objective: Objective,
    clean: Tensor,
    text: TextTokens,
    others: TextTokens | None,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Mean squared errors of a network.

    Args:
        ask: the network: noisy latents (B, C, T, H, W), times (B,) in [0, 1] and text -> output.
        objective: that it was trained with.
        clean: latents (B, C, T, H, W).
        text, others: their captions, and to each another one; ``None`` if there is none.
        generator: of noise and times, on the CPU.

    Returns:
        Scalars: ``loss``, over shares of noise that are spread evenly over [0, 1] (of a flow these are the times), and
        of each tenth, ``loss_t00_10`` … ``loss_t90_100``; ``loss_t95``, over [0.95, 1] alone; both with the captions of
        others, ``loss_shuffled`` and ``loss_t95_shuffled``, the noise being the same; and of the mean of the clips in
        place of a network, ``loss_trivial`` and ``loss_t95_trivial``: of a single clip, which would be its own mean,
        of zero, that of normalised latents. Of v-prediction also all of these in the unit of a flow's velocity,
        ``flow_loss…``.
    """
    rounds = math.ceil(NUM_BINS / len(clean))  # a batch fills every bin
    order = torch.randperm(rounds * len(clean), generator=generator)
    shares = ((order + 0.5) / len(order)).to(clean.device)
    batches = [*shares.split(len(clean)), PURE + (1 - PURE) * shares[: len(clean)]]
    rows = [_errors(ask, objective, clean, text, others, share, generator) for share in batches]
    units = ("loss", "flow_loss") if isinstance(objective, VPrediction) else ("loss",)
    values: dict[str, Tensor] = {}
    for unit in units:
        for name in ("", "_trivial") if others is None else ("", "_shuffled", "_trivial"):
            even = torch.cat([row[f"{unit}{name}"] for row in rows[:-1]])
            values[f"{unit}{name}"] = even.mean()
            values[f"{unit}_t95{name}"] = rows[-1][f"{unit}{name}"].mean()
            for i in range(NUM_BINS if not name else 0):
                values[f"{unit}_t{10 * i:02d}_{10 * (i + 1):02d}"] = even[(shares * NUM_BINS).long() == i].mean()
    return values


def _errors(
    ask: Ask,
    objective: Objective,
    clean: Tensor,
    text: TextTokens,
    others: TextTokens | None,
    share: Tensor,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Mean squared error of every clip (B,) at its share of noise (B,), with new noise; by name."""
    t = times_of_shares(objective, share)
    noise = standard_normal(clean.shape, generator, clean.device)
    noisy, target = objective.noisy(clean, noise, t), objective.target(clean, noise, t)
    factor = flow_error_factor(objective, t)
    values: dict[str, Tensor] = {}
    for name, told in (("", text), ("_shuffled", others)):
        if told is None:
            continue
        error = (ask(noisy, t, told).float() - target).square().flatten(1).mean(dim=1)
        values |= {f"loss{name}": error, f"flow_loss{name}": error * factor}
    for unit, known, times in (("loss", objective, t), ("flow_loss", FlowMatching(), share)):
        constants = trivial_denoising_losses(known, clean, noise, times)
        values[f"{unit}_trivial"] = constants["mean" if len(clean) > 1 else "zero"].expand(len(clean))
    return values
