"""Parameter groups and learning-rate schedules, as pure functions.

A schedule is ``schedule(step, total_steps, …) -> multiplier`` of the optimiser's learning rate, in [0, 1]; ``step``
counts optimiser steps from 0. Warm-up is a share of the run, so that a recipe stretches with the budget.
"""

import math

from torch import nn


def parameter_groups(module: nn.Module) -> list[dict]:
    """Two groups for an optimiser: matrices get its weight decay; biases, norms, and what a module lists in
    ``no_weight_decay`` none.

    Parameters that need no gradient are left out.
    """
    exempt = {
        f"{prefix}.{name}" if prefix else name
        for prefix, child in module.named_modules()
        for name in getattr(child, "no_weight_decay", ())
    }
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (rest if parameter.ndim <= 1 or name in exempt else matrices).append(parameter)
    return [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]


def constant(step: int, total_steps: int, warmup: float = 0.0) -> float:
    """Linear warm-up over ``warmup`` (a share of the run), then 1."""
    rise = _warmup(step, total_steps, warmup)
    return 1.0 if rise is None else rise


def warmup_cosine(step: int, total_steps: int, warmup: float = 0.05, final: float = 0.0) -> float:
    """Linear warm-up over ``warmup`` (a share of the run), then half a cosine from 1 to ``final``."""
    rise = _warmup(step, total_steps, warmup)
    if rise is not None:
        return rise
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * _progress(step, total_steps, warmup)))


def warmup_linear(step: int, total_steps: int, warmup: float = 0.05, final: float = 0.0) -> float:
    """Linear warm-up over ``warmup`` (a share of the run), then a straight line from 1 to ``final``."""
    rise = _warmup(step, total_steps, warmup)
    return rise if rise is not None else 1 + (final - 1) * _progress(step, total_steps, warmup)


def warmup_stable_decay(
    step: int, total_steps: int, warmup: float = 0.05, decay: float = 0.2, final: float = 0.0
) -> float:
    """Linear warm-up over ``warmup``, 1, then straight down to ``final`` over the last ``decay`` (shares of a run)."""
    rise = _warmup(step, total_steps, warmup)
    if not 0 <= decay <= 1 - warmup:
        raise ValueError(
            f"schedule.decay={decay} and warmup={warmup} are shares of one run: their sum must be at most 1."
        )
    return rise if rise is not None else 1 + (final - 1) * _progress(step, total_steps, 1 - decay)


def _warmup(step: int, total_steps: int, warmup: float) -> float | None:
    """The multiplier while warming up, ``None`` after. The first step already learns: it gets 1 / n of n steps."""
    if not 0 <= warmup <= 1:
        raise ValueError(f"schedule.warmup={warmup} is not a share of the run: use a number in [0, 1], such as 0.05.")
    steps = round(warmup * total_steps)
    return (step + 1) / steps if step < steps else None


def _progress(step: int, total_steps: int, begin: float) -> float:
    """0 until the share ``begin`` of the run has passed, 1 at its last step."""
    first, last = round(begin * total_steps), total_steps - 1
    return min(max((step - first) / max(last - first, 1), 0.0), 1.0)
