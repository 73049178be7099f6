"""How strongly a sample follows its text: classifier-free guidance (arXiv 2207.12598), unconditional + s * (conditional
- unconditional), and the scales s of the published models.

A guidance makes, of the network with a text and the network without, the one function that a sampler asks.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from blueberry_video.diffusion.objectives import Objective, over_latents
from blueberry_video.diffusion.samplers import Network


class Guidance(ABC):
    """Called ``guidance(conditional, unconditional, objective, steps)``.

    Attributes:
        unconditional: whether the network without a text is needed: twice the time.
        embedded: the scale that the network itself is told, as its ``guidance``; None where it takes none.
    """

    unconditional: bool = True
    embedded: float | None = None

    def __call__(
        self, conditional: Network, unconditional: Network | None, objective: Objective, steps: int
    ) -> Network:
        """The guided network.

        Args:
            conditional, unconditional: output (B, C, T, H, W) for latents (B, C, T, H, W) at times (B,), with the text
                and without; the second may be ``None`` where it is not needed.
            objective: that the network was trained with.
            steps: of the sampler that will ask.

        Raises:
            ValueError: if the unconditional network is needed and missing.
        """
        if not self.unconditional:
            return conditional
        if unconditional is None:
            raise ValueError(f"{type(self).__name__} needs the network without a text as well: give `unconditional`.")
        without = unconditional

        def guided(latents: Tensor, t: Tensor) -> Tensor:
            base, told = without(latents, t).float(), conditional(latents, t).float()
            return base + over_latents(self.scale_at(t, objective, steps), base) * (told - base)

        return guided

    @abstractmethod
    def scale_at(self, t: Tensor, objective: Objective, steps: int) -> Tensor:
        """The scale s at times ``t`` (B,), float32 (B,)."""


class NoGuidance(Guidance):
    """The text alone: s = 1."""

    unconditional = False

    def scale_at(self, t: Tensor, objective: Objective, steps: int) -> Tensor:
        return torch.ones_like(t)


class ConstantGuidance(Guidance):
    """The same scale at all times.

    Args:
        scale: 0 ignores the text, 1 is the text alone, more exaggerates it; 6 as published with CogVideoX.

    Raises:
        ValueError: for a negative scale.
    """

    def __init__(self, scale: float = 6.0):
        self.scale = _not_negative(scale)

    def scale_at(self, t: Tensor, objective: Objective, steps: int) -> Tensor:
        return torch.full_like(t, self.scale)


class DynamicGuidance(Guidance):
    """From 1 at pure noise up to 1 + scale: s = 1 + scale * (1 - cos(π * progress^exponent)) / 2.

    Args:
        scale: 6 as published.
        mode: ``cosine`` has a progress of 1 - t: the share of the steps that are done, as was meant, if the sampler's
            ``shift`` is 1; with a larger one the scale rises late. ``legacy`` has (steps - network time) / steps, as
            published in diffusers: the network's time counts 1000 steps, not those of the sampler, so that the scale
            jumps up and down until the last few steps.
        exponent: 5 as published.

    Raises:
        ValueError: for a negative scale, another mode, or an exponent that is not above 0.
    """

    def __init__(self, scale: float = 6.0, mode: Literal["cosine", "legacy"] = "cosine", exponent: float = 5.0):
        if mode not in ("cosine", "legacy"):
            raise ValueError(f"mode={mode!r} of the guidance is neither 'cosine' nor 'legacy': choose one of these.")
        if exponent <= 0:
            raise ValueError(f"exponent={exponent} of the guidance must be above 0.")
        self.scale, self.mode, self.exponent = _not_negative(scale), mode, exponent

    def scale_at(self, t: Tensor, objective: Objective, steps: int) -> Tensor:
        legacy = self.mode == "legacy"
        progress = (steps - objective.network_timestep(t).double()) / steps if legacy else 1 - t.double()
        # 64 bits: the legacy progress to the fifth is in the millions
        power = progress.sign() * progress.abs() ** self.exponent
        return (1 + self.scale * (1 - (math.pi * power).cos()) / 2).to(t.dtype)


class EmbeddedGuidance(Guidance):
    """Of a distilled network, which is told the scale and asked once: HunyuanVideo.

    Args:
        scale: 6 as published.

    Raises:
        ValueError: for a negative scale.
    """

    unconditional = False

    def __init__(self, scale: float = 6.0):
        self.embedded = _not_negative(scale)

    def scale_at(self, t: Tensor, objective: Objective, steps: int) -> Tensor:
        return torch.ones_like(t)


def _not_negative(scale: float) -> float:
    if scale < 0:
        raise ValueError(f"scale={scale} of the guidance must not be negative: 1 is no guidance.")
    return scale
