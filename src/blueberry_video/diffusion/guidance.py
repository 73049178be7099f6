"""Classifier-free guidance (arXiv 2207.12598): unconditional + s * (conditional - unconditional), and published scales

A guidance combines the conditional and the unconditional network into the function that a sampler evaluates.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from blueberry_video.diffusion.objectives import Objective, over_latents
from blueberry_video.diffusion.samplers import Network


class Guidance:
    """Base class of guidance, called as ``guidance(conditional, unconditional, objective, steps)``.

    Attributes:
        unconditional: whether the unconditional output is required, which doubles the cost.
        embedded: guidance scale that is an input of the network; ``None`` if it is not.
    """

    unconditional: bool = True
    embedded: float | None = None

    def __call__(
        self, conditional: Network, unconditional: Network | None, objective: Objective, steps: int
    ) -> Network:
        """Returns the guided network.

        Args:
            conditional, unconditional: network with and without the text; the latter may be ``None`` if not required.
            objective: training objective of the network.
            steps: number of steps of the sampler.

        Raises:
            ValueError: if the unconditional network is required and missing.
        """
        if not self.unconditional:
            return conditional
        if unconditional is None:
            raise ValueError(f"{type(self).__name__} requires the network without text: pass `unconditional`.")
        without_text = unconditional

        def guided(latents: Tensor, t: Tensor) -> Tensor:
            base, output = without_text(latents, t), conditional(latents, t)
            dtype = torch.promote_types(base.dtype, torch.float32)  # float64 stays float64
            scale = self.scale_at(t.to(dtype), objective, steps)
            return base.to(dtype) + over_latents(scale, base) * (output.to(dtype) - base.to(dtype))

        return guided

    def scale_at(self, t: Tensor, objective: Objective, steps: int) -> Tensor:
        """Returns the guidance scale at timesteps ``t`` (B,), (B,) in their dtype. Defaults to 1."""
        return torch.ones_like(t)


class NoGuidance(Guidance):
    """No guidance: s = 1."""

    unconditional = False


class ConstantGuidance(Guidance):
    """Guidance with the same scale at all timesteps.

    Args:
        scale: 0 ignores the text, 1 is no guidance; 6 as published for CogVideoX.

    Raises:
        ValueError: for a negative scale.
    """

    def __init__(self, scale: float = 6.0):
        self.scale = _not_negative(scale)

    def scale_at(self, t: Tensor, objective: Objective, steps: int) -> Tensor:
        return torch.full_like(t, self.scale)


class DynamicGuidance(Guidance):
    """Dynamic guidance of CogVideoX: s = 1 + scale * (1 - cos(π * progress^exponent)) / 2, between 1 and 1 + scale.

    Args:
        scale: 6 as published.
        mode: ``legacy``, as published, has progress (steps - network timestep) / steps, in the original code (SAT) and
            in diffusers: the network timestep is in units of 1000 steps, not of the sampler's, so that the scale
            oscillates until the last few steps. ``cosine``, which is not published, has progress 1 - t, the fraction
            of finished steps if the sampler's ``shift`` is 1: the scale rises from 1 at pure noise to 1 + scale; with a
            larger shift it rises late.
        exponent: 5 as published.

    Raises:
        ValueError: for a negative scale, an unknown mode, or an exponent that is not above 0.
    """

    def __init__(self, scale: float = 6.0, mode: Literal["cosine", "legacy"] = "legacy", exponent: float = 5.0):
        if mode not in ("cosine", "legacy"):
            raise ValueError(f"mode={mode!r} of the guidance must be 'cosine' or 'legacy'.")
        if exponent <= 0:
            raise ValueError(f"exponent={exponent} of the guidance must be above 0.")
        self.scale, self.mode, self.exponent = _not_negative(scale), mode, exponent

    def scale_at(self, t: Tensor, objective: Objective, steps: int) -> Tensor:
        legacy = self.mode == "legacy"
        progress = (steps - objective.network_timestep(t).double()) / steps if legacy else 1 - t.double()
        # float64: the legacy progress to the fifth power is in the millions
        power = progress.sign() * progress.abs() ** self.exponent
        return (1 + self.scale * (1 - (math.pi * power).cos()) / 2).to(t.dtype)


class EmbeddedGuidance(Guidance):
    """Guidance of a distilled network that receives the scale as input and is evaluated once: HunyuanVideo.

    Args:
        scale: 6 as published.
        cfg_scale: scale of classifier-free guidance in addition, which also evaluates the network with the
            unconditional text and the same embedded scale ("true CFG" in diffusers); 1 evaluates it once.

    Raises:
        ValueError: for a negative scale.
    """

    def __init__(self, scale: float = 6.0, cfg_scale: float = 1.0):
        self.embedded, self.cfg_scale = _not_negative(scale), _not_negative(cfg_scale)
        self.unconditional = cfg_scale != 1

    def scale_at(self, t: Tensor, objective: Objective, steps: int) -> Tensor:
        return torch.full_like(t, self.cfg_scale)


def _not_negative(scale: float) -> float:
    if scale < 0:
        raise ValueError(f"scale={scale} of the guidance must not be negative; 1 is no guidance.")
    return scale
