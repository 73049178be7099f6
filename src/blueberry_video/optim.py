"""Parameter groups and schedules as pure functions.

A learning-rate schedule is ``schedule(step, total_steps, …) -> multiplier`` of the optimizer's learning rate, in [0,
1]; ``step`` counts optimizer steps from 0. Warm-up is a share of the run, so that a schedule scales with its length.
``ramp`` and ``cosine_ramp`` return absolute values, such as a momentum or a weight decay.

``counting`` is the position of a step in a phase of the schedule that begins at step b of a run of n steps:
``"inclusive"``, (step - b) / (n - 1 - b): the first step has the initial value and the last the final one;
``"after"``, (step + 1 - b) / (n - b): the value at the end of the step, as learning rate and weight decay of V-JEPA;
``"before"``, (step - b) / (n - b): the value at its beginning, as the schedules of VideoMAE and V-JEPA's momentum.
"""

import math
import re
from collections.abc import Iterable, Sequence

from torch import nn


def decayed_names(module: nn.Module) -> set[str]:
    """Returns the names of parameters with weight decay: matrices not listed in a module's ``no_weight_decay``."""
    exempt = {
        f"{prefix}.{name}" if prefix else name
        for prefix, child in module.named_modules()
        for name in getattr(child, "no_weight_decay", ())
    }
    return {name for name, parameter in module.named_parameters() if parameter.ndim > 1 and name not in exempt}


def parameter_groups(module: nn.Module, layer_decay: float = 1.0, decays_head: bool = False) -> list[dict]:
    """Returns optimizer groups: weight decay applies to matrices, not to biases, norms and ``no_weight_decay``.

    With ``layer_decay`` below 1 each layer of the encoder has two separate groups, and its learning rate decreases
    towards the input, as in the fine-tuning of BEiT (arXiv 2106.08254) and VideoMAE. Parameters that the encoder
    registers before its blocks (patch embedding, positions) are layer 0, block i is layer i + 1, all other parameters
    (norm, head) are layer depth + 1. Optimizers ignore ``lr_scale``: the caller multiplies each group's learning rate
    by it, once.

    Args:
        module: contains the encoder as ``encoder`` and its blocks as ``encoder.blocks``, at any depth.
        layer_decay: in (0, 1]; layer l has ``lr_scale = layer_decay ** (depth + 1 - l)``. At 1 there are two groups.
        decays_head: one more factor ``layer_decay`` for all layers, the head included, as in OmniMAE's fine-tuning.

    Returns:
        Groups with ``params``, ``lr_scale`` and, without weight decay, ``weight_decay`` 0; those of the head are
        first. Frozen parameters are left out.

    Raises:
        ValueError: for a ``layer_decay`` outside (0, 1], or below 1 where there are no ``encoder.blocks``.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(
            f"task.optimization.layer_decay={layer_decay} must be in (0, 1]: 1 for none; VideoMAE-B is fine-tuned "
            "with 0.75."
        )
    decayed = decayed_names(module)
    scales = _layer_scales(module, layer_decay) if layer_decay < 1 else {}
    matrices: dict[float, list[nn.Parameter]] = {1.0: []}
    rest: dict[float, list[nn.Parameter]] = {1.0: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            chosen = matrices if name in decayed else rest
            chosen.setdefault(scales.get(name, 1.0), []).append(parameter)
    groups: list[dict] = []
    factor = layer_decay if decays_head else 1.0
    for scale in sorted({*matrices, *rest}, reverse=True):
        groups.append({"params": matrices.get(scale, []), "lr_scale": scale * factor})
        groups.append({"params": rest.get(scale, []), "lr_scale": scale * factor, "weight_decay": 0.0})
    return groups


def scaled_groups(groups: list[dict], scales: Sequence[tuple[Iterable[nn.Parameter], float]]) -> list[dict]:
    """Splits groups of :func:`parameter_groups` by learning rate.

    Args:
        groups: have ``params`` and ``lr_scale``.
        scales: parameters, and the factor on their ``lr_scale``; a parameter belongs to the first that contains it.

    Returns:
        Groups in the order of ``scales``, then those of the remaining parameters.
    """
    factors: dict[nn.Parameter, tuple[int, float]] = {}
    for rank, (parameters, factor) in enumerate(scales):
        for parameter in parameters:
            factors.setdefault(parameter, (rank, factor))
    found = []
    for rank, factor in [*((rank, factor) for rank, (_, factor) in enumerate(scales)), (len(scales), 1.0)]:
        for group in groups:
            own = [each for each in group["params"] if factors.get(each, (len(scales), 1.0))[0] == rank]
            found.append({**group, "lr_scale": group["lr_scale"] * factor, "params": own})
    return found


def _layer_scales(module: nn.Module, layer_decay: float) -> dict[str, float]:
    """Returns parameter name -> learning-rate factor, for the parameters of ``encoder`` up to its last block."""
    names = [name for name, _ in module.named_parameters()]
    blocks = {name: found for name in names if (found := re.search(r"(?:^|\.)encoder\.blocks\.(\d+)\.", name))}
    if not blocks:
        raise ValueError(
            f"task.optimization.layer_decay={layer_decay} requires the encoder's layers, but {type(module).__name__} "
            "has no parameters named encoder.blocks.<number>: set task.optimization.layer_decay=1, or keep the layers "
            "of the encoder in a ModuleList `blocks`."
        )
    depth = 1 + max(int(found[1]) for found in blocks.values())
    first = names.index(next(iter(blocks)))
    stem = next(iter(blocks)).split("blocks.")[0]  # for example "model.encoder."
    layers = {name: 0 for name in names[:first] if name.startswith(stem)}
    layers |= {name: int(found[1]) + 1 for name, found in blocks.items()}
    return {name: layer_decay ** (depth + 1 - layer) for name, layer in layers.items()}


def constant(
    step: int, total_steps: int, warmup: float = 0.0, start: float = 0.0, counting: str = "inclusive"
) -> float:
    """Linear warm-up from ``start`` over ``warmup`` (a share of the run), then 1."""
    rise = _warmup(step, total_steps, warmup, start, counting)
    return 1.0 if rise is None else rise


def warmup_cosine(
    step: int,
    total_steps: int,
    warmup: float = 0.05,
    final: float = 0.0,
    start: float = 0.0,
    stretch: float = 1.0,
    counting: str = "inclusive",
) -> float:
    """Linear warm-up from ``start`` over ``warmup`` (a share of the run), then cosine decay from 1 to ``final``.

    With ``stretch`` above 1 the cosine has the length of a run that is longer by this factor, and is truncated at the
    end of the run: V-JEPA (arXiv 2404.08471) stops at 1 / 1.25 of it.
    """
    rise = _warmup(step, total_steps, warmup, start, counting)
    if rise is not None:
        return rise
    return _fall(_progress(step, _stretched(total_steps, stretch), warmup / stretch, counting), final)


def warmup_linear(
    step: int,
    total_steps: int,
    warmup: float = 0.05,
    final: float = 0.0,
    start: float = 0.0,
    counting: str = "inclusive",
) -> float:
    """Linear warm-up from ``start`` over ``warmup`` (a share of the run), then linear decay from 1 to ``final``."""
    rise = _warmup(step, total_steps, warmup, start, counting)
    return rise if rise is not None else 1 + (final - 1) * _progress(step, total_steps, warmup, counting)


def warmup_stable_decay(
    step: int,
    total_steps: int,
    warmup: float = 0.05,
    decay: float = 0.2,
    final: float = 0.0,
    start: float = 0.0,
    counting: str = "inclusive",
) -> float:
    """Linear warm-up from ``start`` over ``warmup``, then 1, then linear decay to ``final`` over the last ``decay``.

    ``warmup`` and ``decay`` are shares of the run.
    """
    rise = _warmup(step, total_steps, warmup, start, counting)
    if not 0 <= decay <= 1 - warmup:
        raise ValueError(
            f"schedule.decay={decay} must be at most 1 - schedule.warmup={warmup}: both are shares of the run."
        )
    return rise if rise is not None else 1 + (final - 1) * _progress(step, total_steps, 1 - decay, counting)


def exponential(step: int, total_steps: int, final: float = 0.01) -> float:
    """Exponential decay from 1 to ``final``, linear in the logarithm."""
    if not 0 < final <= 1:
        raise ValueError(f"schedule.final={final} must be in (0, 1]: an exponential decay does not reach 0.")
    return final ** _progress(step, total_steps, 0.0)


def ramp(
    step: int, total_steps: int, start: float, end: float, stretch: float = 1.0, counting: str = "inclusive"
) -> float:
    """Linear from ``start`` at the first step to ``end``, which a run ``stretch`` times as long would reach.

    V-JEPA's (arXiv 2404.08471) momentum: 0.998 to 1, stretched by 1.25. V-JEPA 2's (arXiv 2506.09985) stays at 0.99925.
    """
    return start + (end - start) * _progress(step, _stretched(total_steps, stretch), 0.0, counting)


def cosine_ramp(
    step: int, total_steps: int, start: float, end: float, stretch: float = 1.0, counting: str = "inclusive"
) -> float:
    """Like :func:`ramp`, along half a cosine. V-JEPA's weight decay: 0.04 to 0.4, stretched by 1.25."""
    progress = _progress(step, _stretched(total_steps, stretch), 0.0, counting)
    return start + (end - start) * (1 - _fall(progress, 0.0))


def _warmup(step: int, total_steps: int, warmup: float, start: float, counting: str) -> float | None:
    """Returns the multiplier during warm-up, ``None`` after it. The first of n steps is 1 / n of the way up, not 0;
    with ``counting="before"`` it is 0, and the last is 1."""
    for key, value in (("warmup", warmup), ("start", start)):
        if not 0 <= value <= 1:
            raise ValueError(f"schedule.{key}={value} must be in [0, 1]: use a share, such as 0.05.")
    steps = round(warmup * total_steps)
    if step >= steps:
        return None
    return start + (1 - start) * (step / max(steps - 1, 1) if counting == "before" else (step + 1) / steps)


def _progress(step: int, total_steps: int, begin: float, counting: str = "inclusive") -> float:
    """Linear progress from 0 at the share ``begin`` of the run to 1 at its end, see the head of this module."""
    if counting not in ("inclusive", "after", "before"):
        raise ValueError(f"counting={counting!r} of a schedule is unknown: use 'inclusive', 'after' or 'before'.")
    first, end = round(begin * total_steps), total_steps - (counting == "inclusive")
    return min(max((step + (counting == "after") - first) / max(end - first, 1), 0.0), 1.0)


def _fall(progress: float, final: float) -> float:
    """Cosine decay from 1 to ``final``."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def _stretched(total_steps: int, stretch: float) -> int:
    """Returns the number of steps over which a stretched schedule is defined."""
    if stretch < 1:
        raise ValueError(
            f"stretch={stretch} must be at least 1: use 1, or 1.25 (V-JEPA) to end the run before the schedule."
        )
    return round(stretch * total_steps)
