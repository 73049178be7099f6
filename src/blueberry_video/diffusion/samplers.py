"""Samplers: DDIM (arXiv 2010.02502), DPM-Solver++ 2M SDE (arXiv 2211.01095) and Euler's method for flow matching.

Timesteps descend from 1 to 0 with even spacing ("trailing": the first is pure noise), are shifted towards noise once,
and always end at the clean latents, for any number of steps. DDIM and DPM-Solver++ use only alpha_t and sigma_t, so
they support every objective; for flow matching, DDIM is Euler's method.

alpha_t of a step is that of training, as in diffusers. The samplers of CogVideoX's original code (SAT) rescale to zero
terminal SNR again after the choice of steps, so that its samples differ: with ``snr_shift`` 3, alpha_t is larger by up
to 1.0e-3 with 50 steps and by up to 5.7e-3 with 10, at the least noise.

Latents are at least float32 between steps, for any dtype of the network.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from blueberry_video.diffusion.objectives import FlowMatching, Objective
from blueberry_video.diffusion.timesteps import shift_timesteps
from blueberry_video.nn.noise import Generator, standard_normal

# (latents (B, C, T, H, W), timesteps (B,) in [0, 1]) -> output in the shape of the latents
Network = Callable[[Tensor, Tensor], Tensor]
Prediction = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # (latents, t) -> predicted clean latents and noise
Schedule = Sequence[tuple[float, float, float]]  # t, alpha_t and sigma_t, from t = 1 to t = 0


class Sampler(ABC):
    """Base class of samplers, called as ``sampler(denoise, noise, objective, generator)``.

    Args:
        steps: number of network evaluations.
        shift: timestep shift, see :func:`~blueberry_video.diffusion.timesteps.shift_timesteps`; for flow matching.

    Raises:
        ValueError: for fewer than one step, or a shift that is not above 0.
    """

    def __init__(self, steps: int = 50, shift: float = 1.0):
        if steps < 1:
            raise ValueError(f"steps={steps} of the sampler must be at least 1.")
        if shift <= 0:
            raise ValueError(f"shift={shift} of the sampler must be above 0; 1 is no shift.")
        self.steps, self.shift = steps, shift

    def timesteps(self, objective: Objective) -> Tensor:
        """Returns the timesteps (steps + 1,), float32, from 1 to 0.

        Raises:
            ValueError: for more steps than the objective has, or an unsupported objective.
        """
        even = torch.linspace(1, 0, self.steps + 1, dtype=torch.float32)
        timesteps = objective.snap(shift_timesteps(even, self.shift))
        if (timesteps.diff() >= 0).any():
            raise ValueError(
                f"steps={self.steps} with shift={self.shift} exceed the steps of the objective: use fewer steps."
            )
        return timesteps

    def skipped_steps(self, strength: float) -> int:
        """Returns the number of first steps that sampling from partial noise leaves out, as the video-to-video
        pipelines of diffusers: ``steps - int(steps * strength)``.

        Args:
            strength: share of the steps that are taken, in (0, 1].

        Raises:
            ValueError: for a strength outside (0, 1], or of less than one step.
        """
        if not 0 < strength <= 1:
            raise ValueError(f"strength={strength} must be above 0, the given video, and at most 1, pure noise.")
        if not (taken := int(self.steps * strength)):
            raise ValueError(
                f"strength={strength} of steps={self.steps} is less than one step: use a strength of at least "
                f"{1 / self.steps:.2g}, or more steps."
            )
        return self.steps - taken

    @torch.no_grad()
    def __call__(
        self,
        denoise: Network,
        noise: Tensor,
        objective: Objective,
        generator: Generator = None,
        start: Tensor | None = None,
        strength: float = 1.0,
    ) -> Tensor:
        """Samples clean latents.

        Args:
            denoise: conditioned and guided network, ``denoise(noisy, t (B,)) -> output``.
            noise: (B, C, T, H, W), standard normal.
            objective: training objective of the network.
            generator: generator of the noise of a stochastic sampler, or one per clip; ``None`` for torch's global one.
            start: clean latents (B, C, T, H, W), to which ``noise`` is added at the level of the first step that is
                taken; ``None`` to start from pure noise.
            strength: share of the steps that are taken from ``start``, see :meth:`skipped_steps`.

        Returns:
            (B, C, T, H, W), in the dtype of ``noise``.

        Raises:
            ValueError: for noise of a different rank or that is not finite, an unsupported objective, a strength out of
                range, or an output of a different shape than the noise.
            FloatingPointError: if the network output is not finite.
        """
        if noise.ndim != 5 or not noise.isfinite().all():
            raise ValueError(f"noise of shape {tuple(noise.shape)} must be (B, C, T, H, W) and finite.")
        timesteps = self.timesteps(objective)

        def predict(latents: Tensor, t: float) -> tuple[Tensor, Tensor]:
            timestep = torch.full((len(noise),), t, device=noise.device)
            output = denoise(latents.to(noise.dtype), timestep)
            if output.shape != noise.shape:
                raise ValueError(
                    f"the network output has shape {tuple(output.shape)}; it must equal that of the latents, "
                    f"{tuple(noise.shape)}."
                )
            return objective.to_clean(output, latents, timestep), objective.to_noise(output, latents, timestep)

        wide = noise.to(torch.promote_types(noise.dtype, torch.float32))
        columns = (timesteps, *objective.alpha_sigma(timesteps))
        schedule = list(zip(*(column.tolist() for column in columns), strict=True))
        if start is not None:
            skipped = self.skipped_steps(strength)
            schedule, level = schedule[skipped:], timesteps[skipped].to(noise.device)
            wide = objective.noisy(start.to(wide), wide, level.expand(len(noise)))
        clean = self._sample(predict, wide, schedule, generator)
        if not clean.isfinite().all():
            raise FloatingPointError(
                "the network output is not finite: use bf16 or fp32, not fp16, for weights trained in bf16."
            )
        return clean.to(noise.dtype)

    @abstractmethod
    def _sample(self, predict: Prediction, latents: Tensor, schedule: Schedule, generator: Generator) -> Tensor:
        """Denoises ``latents`` over the schedule."""


class DDIM(Sampler):
    """Deterministic sampler that keeps the predicted noise and lowers its level.

    If ``steps`` does not divide ``num_steps``, diffusers' scheduler for CogVideoX steps to different timesteps than it
    evaluates next, and may end at noisy latents; this one does not.
    """

    def _sample(self, predict: Prediction, latents: Tensor, schedule: Schedule, generator: Generator) -> Tensor:
        for (t, _, _), (_, alpha, sigma) in pairwise(schedule):
            clean, noise = predict(latents, t)
            latents = alpha * clean + sigma * noise
        return latents


class DPMSolverSDE(Sampler):
    """DPM-Solver++ 2M SDE, the published sampler of CogVideoX.

    With λ = log(alpha / sigma), a step of h in λ keeps a fraction exp(-h) of the noise and replaces the rest by new
    noise; the clean latents are extrapolated from the current and the previous prediction. The first step, which has no
    previous prediction, and the last step, which has sigma = 0, do not extrapolate.
    """

    def _sample(self, predict: Prediction, latents: Tensor, schedule: Schedule, generator: Generator) -> Tensor:
        previous: Tensor | None = None
        previous_h = math.inf
        for (t, last_alpha, last_sigma), (_, alpha, sigma) in pairwise(schedule):
            clean, _ = predict(latents, t)
            kept = last_alpha * sigma / (last_sigma * alpha)  # exp(-h): 0 from pure noise and to clean latents
            h = -math.log(kept) if kept > 0 else math.inf
            extrapolated = clean
            if previous is not None and sigma > 0:
                extrapolated = torch.lerp(previous, clean, 1 + h / (2 * previous_h))
            latents = sigma / last_sigma * kept * latents + alpha * (1 - kept**2) * extrapolated
            if sigma > 0:
                noise = standard_normal(latents.shape, generator, latents.device)
                latents = latents + sigma * math.sqrt(1 - kept**2) * noise
            previous, previous_h = clean, h
        return latents


class FlowEuler(Sampler):
    """Euler's method for flow matching, the published sampler of HunyuanVideo.

    Args:
        steps: number of network evaluations.
        shift: timestep shift, 7 for HunyuanVideo. It is applied once; diffusers' scheduler applies it twice if it
            receives a number of steps instead of sigmas (its issue 13243).
    """

    def __init__(self, steps: int = 50, shift: float = 7.0):
        super().__init__(steps, shift)

    def timesteps(self, objective: Objective) -> Tensor:
        if not isinstance(objective, FlowMatching):
            raise ValueError(
                f"FlowEuler requires FlowMatching, not {type(objective).__name__}: use DDIM or DPMSolverSDE."
            )
        return super().timesteps(objective)

    def _sample(self, predict: Prediction, latents: Tensor, schedule: Schedule, generator: Generator) -> Tensor:
        for (t, _, _), (next_t, _, _) in pairwise(schedule):
            clean, noise = predict(latents, t)
            latents = latents + (next_t - t) * (noise - clean)
        return latents
