"""Prediction targets and noise schedules: v-prediction (CogVideoX, arXiv 2408.06072) and flow matching
(HunyuanVideo, arXiv 2412.03603).

Noisy latents are x_t = alpha_t * clean + sigma_t * noise; objectives differ in the coefficients and in the target. The
schedule of CogVideoX has a shifted signal-to-noise ratio, rescaled to zero terminal SNR (arXiv 2305.08891). Its
published loss, the squared error of the clean latents times 1 / (1 - alpha_t²), equals the squared error of v, which
stays finite there: the loss of an objective is always the mean squared error of its target.

Coefficients are float32 for any dtype of the latents: bfloat16 changes the noise of the first steps by up to half.

Shapes: B clips, C channels, T frames, H x W rows and columns.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Objective(ABC):
    """Base class of objectives.

    Timesteps t are floats in [0, 1], 0 clean and 1 pure noise, of shape (B,), or (B, T) for one per frame. Latents,
    noise and network outputs are (B, C, T, H, W). Results have the dtype of the latents, but at least float32 where not
    stated otherwise.
    """

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the signal and noise coefficients of x_t: float32, in the shape of ``t``."""

    @abstractmethod
    def network_timestep(self, t: Tensor) -> Tensor:
        """Returns the timestep that is passed to the network: float32 in [0, 1000]."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns the prediction target."""

    @abstractmethod
    def to_clean(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """Returns the clean latents predicted by a network output."""

    @abstractmethod
    def to_noise(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """Returns the noise predicted by a network output."""

    def snap(self, t: Tensor) -> Tensor:
        """Rounds timesteps to those of the schedule, for samplers."""
        return t

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns x_t in the dtype of ``clean``.

        Raises:
            ValueError: if ``t`` is neither (B,) nor (B, T), or ``noise`` and ``clean`` differ in shape.
        """
        if noise.shape != clean.shape:
            raise ValueError(
                f"noise of shape {tuple(noise.shape)} must have the shape of latents {tuple(clean.shape)}."
            )
        alpha, sigma = self.alpha_sigma(over_latents(t, clean))
        return (alpha * _wide(clean) + sigma * _wide(noise)).to(clean.dtype)


class VPrediction(Objective):
    """v-prediction, alpha_t * noise - sigma_t * clean, with ``num_steps`` discrete noise levels.

    t = 0 is the clean latent, and t in (k / num_steps, (k + 1) / num_steps] is step k of the published schedule, so
    that t uniform in [0, 1) draws every step with equal probability.

    Args:
        num_steps: number of steps of the schedule.
        beta_start, beta_end: variance added by the first and last step; their square roots are evenly spaced
            ("scaled linear").
        snr_shift: divisor of the signal-to-noise ratio: 3 in CogVideoX-2B, 1 in 5B and 1.5.
        zero_terminal_snr: rescale alpha_t to 0 at the last step.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        num_steps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        snr_shift: float = 3.0,
        zero_terminal_snr: bool = True,
    ):
        if num_steps < 2:
            raise ValueError(f"num_steps={num_steps} of the noise schedule must be at least 2; 1000 as published.")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"beta_start={beta_start} and beta_end={beta_end} must increase and be between 0 and 1.")
        if snr_shift <= 0:
            raise ValueError(f"snr_shift={snr_shift} must be above 0; 1 is no shift.")
        self.num_steps = num_steps
        with torch.device("cpu"):  # has values also if the objective is built under the meta device
            betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64).square()
            power = (1 - betas).cumprod(0)  # alpha²
            power = power / (snr_shift + (1 - snr_shift) * power)
            alpha = power.sqrt()
            if zero_terminal_snr:
                alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
            alpha = torch.cat([torch.ones(1, dtype=torch.float64), alpha])  # t = 0
            # sigma in float64: in float32, 1 - alpha² of the first step has three digits
            self._table = torch.stack([alpha, (1 - alpha.square()).sqrt()]).float()  # (2, num_steps + 1)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if self._table.device != t.device:
            with torch.inference_mode(False):  # cached, also for training
                self._table = self._table.to(t.device)
        alpha, sigma = self._table[:, self._index(t)]
        return alpha, sigma

    def network_timestep(self, t: Tensor) -> Tensor:
        """Returns the index of the step, 0 … num_steps - 1, as float32; 0 also for the clean latent."""
        return (self._index(t) - 1).clamp(min=0).float()

    def snap(self, t: Tensor) -> Tensor:
        return (t * self.num_steps).round() / self.num_steps

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(over_latents(t, clean))
        return alpha * _wide(noise) - sigma * _wide(clean)

    def to_clean(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(over_latents(t, noisy))
        return alpha * _wide(noisy) - sigma * _wide(output)

    def to_noise(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(over_latents(t, noisy))
        return sigma * _wide(noisy) + alpha * _wide(output)

    def _index(self, t: Tensor) -> Tensor:
        """Returns the index into the table (long), 0 for the clean latent."""
        # float32 t * 1000 is off by up to 6e-5, which must not move k / 1000 to the next step
        return (t.float() * self.num_steps - 1e-3).ceil().long().clamp(0, self.num_steps)


class FlowMatching(Objective):
    """Flow matching: velocity noise - clean of the path x_t = (1 - t) * clean + t * noise, with continuous t."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t.float(), t.float()

    def network_timestep(self, t: Tensor) -> Tensor:
        """Returns 1000 t, not rounded."""
        return 1000 * t.float()

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return _wide(noise) - _wide(clean)

    def to_clean(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        _, sigma = self.alpha_sigma(over_latents(t, noisy))
        return _wide(noisy) - sigma * _wide(output)

    def to_noise(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        alpha, _ = self.alpha_sigma(over_latents(t, noisy))
        return _wide(noisy) + alpha * _wide(output)


class AddedNoise(Objective):
    """Control objective that must fail: prediction of noise added at one fixed level, without a timestep.

    The clip stays visible through such noise, so the loss falls; but the network is never trained on pure noise, where
    sampling starts. Not for use.
    """

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t, dtype=torch.float32), (t > 0).float()

    def network_timestep(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t, dtype=torch.float32)

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise.float()

    def to_clean(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        return noisy.float() - output.float()

    def to_noise(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        return output.float()


def over_latents(values: Tensor, latents: Tensor) -> Tensor:
    """Reshapes values per clip (B,) or per frame (B, T) to broadcast over latents (B, C, T, H, W).

    Raises:
        ValueError: for different shapes.
    """
    if latents.ndim != 5 or tuple(values.shape) not in ((latents.shape[0],), (latents.shape[0], latents.shape[2])):
        raise ValueError(
            f"timesteps of shape {tuple(values.shape)} for latents of {tuple(latents.shape)}: latents must be "
            "(B, C, T, H, W), and timesteps (B,), one per clip, or (B, T), one per frame."
        )
    return values.view(len(values), 1, -1, 1, 1)


def _wide(x: Tensor) -> Tensor:
    """Converts to at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
