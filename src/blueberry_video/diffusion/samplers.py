"""From noise to clean latents in a few steps: DDIM (arXiv 2010.02502), DPM-Solver++ 2M SDE (arXiv 2211.01095) and
Euler's method for flows.

A sampler's times go from 1 to 0 in even steps ("trailing": the first is pure noise), are shifted towards noise once,
and always end at the clean latent, whatever the number of steps. DDIM and the solver know nothing but the levels of
signal and noise of an objective, so they serve every one; in a flow, DDIM is Euler's method.

The latents keep 32 bits from step to step, whatever the network computes in.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from blueberry_video.diffusion.objectives import FlowMatching, Objective
from blueberry_video.diffusion.timesteps import shift_times
from blueberry_video.nn.noise import standard_normal

Network = Callable[
    [Tensor, Tensor], Tensor
]  # latents (B, C, T, H, W) at times (B,) in [0, 1] -> output, as the latents
Prediction = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # latents at a time -> the clean latents and the noise


class Sampler(ABC):
    """Called ``sampler(denoise, noise, objective, generator)``.

    Args:
        steps: evaluations of the network.
        shift: s of :func:`blueberry_video.diffusion.timesteps.shift_times`, for flows; 1 keeps the even steps.

    Raises:
        ValueError: for less than one step, or a shift that is not above 0.
    """

    def __init__(self, steps: int = 50, shift: float = 1.0):
        if steps < 1:
            raise ValueError(f"steps={steps} of a sampler: use 1 or more.")
        if shift <= 0:
            raise ValueError(f"shift={shift} of a sampler must be above 0: 1 shifts nothing.")
        self.steps, self.shift = steps, shift

    def times(self, objective: Objective) -> Tensor:
        """The times (steps + 1,) float32 that are visited, from 1 down to 0.

        Raises:
            ValueError: for more steps than the objective has, or an objective that the sampler cannot follow.
        """
        times = objective.snap(shift_times(torch.linspace(1, 0, self.steps + 1, dtype=torch.float32), self.shift))
        if (times.diff() >= 0).any():
            raise ValueError(f"steps={self.steps} with shift={self.shift} are more than the objective has: take fewer.")
        return times

    @torch.no_grad()
    def __call__(
        self, denoise: Network, noise: Tensor, objective: Objective, generator: torch.Generator | None = None
    ) -> Tensor:
        """Samples clean latents.

        Args:
            denoise: the network, with its text and its guidance: ``denoise(noisy, t (B,)) -> output``.
            noise: (B, C, T, H, W), standard normal.
            objective: that the network was trained with.
            generator: of the noise that a stochastic sampler adds; torch's global one if ``None``.

        Returns:
            (B, C, T, H, W), in the dtype of ``noise``.

        Raises:
            ValueError: for noise of another rank or with values that are not finite, an objective that the sampler
                cannot follow, or an output of another shape than the noise.
            FloatingPointError: if the network's output is not finite.
        """
        if noise.ndim != 5 or not noise.isfinite().all():
            raise ValueError(f"noise of shape {tuple(noise.shape)}: latents are (B, C, T, H, W), and finite numbers.")
        times = self.times(objective)

        def predict(latents: Tensor, t: float) -> tuple[Tensor, Tensor]:
            time = torch.full((len(noise),), t, device=noise.device)
            output = denoise(latents.to(noise.dtype), time)
            if output.shape != noise.shape:
                raise ValueError(
                    f"the network made {tuple(output.shape)} of latents {tuple(noise.shape)}: a sampler needs the "
                    "same shape."
                )
            return objective.to_clean(output, latents, time), objective.to_noise(output, latents, time)

        wide = noise.to(torch.promote_types(noise.dtype, torch.float32))
        clean = self._sample(predict, wide, times, objective, generator)
        if not clean.isfinite().all():
            raise FloatingPointError(
                "the network's output is not finite: use bf16 or fp32 where weights were trained in bf16, not fp16."
            )
        return clean.to(noise.dtype)

    @abstractmethod
    def _sample(
        self,
        predict: Prediction,
        latents: Tensor,
        times: Tensor,
        objective: Objective,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Takes ``latents`` through ``times``."""


class DDIM(Sampler):
    """Deterministic: keeps the noise that the network sees, and lowers its level.

    On ``num_steps`` that are no multiple of ``steps``, diffusers' scheduler for CogVideoX goes to times other than
    those it evaluates next, and may end before the clean latent; this one does not.
    """

    def _sample(
        self,
        predict: Prediction,
        latents: Tensor,
        times: Tensor,
        objective: Objective,
        generator: torch.Generator | None,
    ) -> Tensor:
        signals, levels = (values.tolist() for values in objective.levels(times))
        for i, t in enumerate(times[:-1].tolist()):
            clean, noise = predict(latents, t)
            latents = signals[i + 1] * clean + levels[i + 1] * noise
        return latents


class DPMSolverSDE(Sampler):
    """The sampler published with CogVideoX. With λ = log(signal / noise), a step h of λ keeps the share exp(-h) of the
    noise, and replaces the rest by new noise; the clean latent is extrapolated from this step and the one before.

    The first step, which has nothing before it, and the last one, to no noise, take the clean latent as it is.
    """

    def _sample(
        self,
        predict: Prediction,
        latents: Tensor,
        times: Tensor,
        objective: Objective,
        generator: torch.Generator | None,
    ) -> Tensor:
        signals, levels = (values.tolist() for values in objective.levels(times))
        before: Tensor | None = None
        h_before = math.inf
        for i, t in enumerate(times[:-1].tolist()):
            clean, _ = predict(latents, t)
            signal, level = signals[i + 1], levels[i + 1]
            kept = signals[i] * level / (levels[i] * signal)  # exp(-h): 0 from pure noise, and to none
            h = -math.log(kept) if kept > 0 else math.inf
            ahead = clean
            if before is not None and level > 0:
                ahead = torch.lerp(before, clean, 1 + h / (2 * h_before))
            latents = level / levels[i] * kept * latents + signal * (1 - kept**2) * ahead
            if level > 0:
                latents = latents + level * math.sqrt(1 - kept**2) * standard_normal(
                    latents.shape, generator, latents.device
                )
            before, h_before = clean, h
        return latents


class FlowEuler(Sampler):
    """Follows the velocity of a flow in straight steps: the sampler of HunyuanVideo.

    Args:
        steps: evaluations of the network.
        shift: 7 for HunyuanVideo. It is applied once: diffusers' scheduler applies it twice where it is asked for a
            number of steps rather than for times (its issue 13243).
    """

    def __init__(self, steps: int = 50, shift: float = 7.0):
        super().__init__(steps, shift)

    def times(self, objective: Objective) -> Tensor:
        if not isinstance(objective, FlowMatching):
            raise ValueError(
                f"FlowEuler follows a flow, but the objective is {type(objective).__name__}: use DDIM or DPMSolverSDE."
            )
        return super().times(objective)

    def _sample(
        self,
        predict: Prediction,
        latents: Tensor,
        times: Tensor,
        objective: Objective,
        generator: torch.Generator | None,
    ) -> Tensor:
        for t, following in pairwise(times.tolist()):
            clean, noise = predict(latents, t)
            latents = latents + (following - t) * (noise - clean)
        return latents
