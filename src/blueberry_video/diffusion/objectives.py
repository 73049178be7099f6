"""What a diffusion network is trained to say: the velocity of CogVideoX (arXiv 2408.06072) or of flow matching
(HunyuanVideo, arXiv 2412.03603).

Both mix a clean latent and noise, x_t = signal(t) * clean + noise(t) * noise, and differ in the two levels and in the
target. Unusual about CogVideoX: the signal-to-noise ratio is shifted, then stretched until the last step is pure noise
(arXiv 2305.08891). Its published loss, the error of the clean latent times 1 / (1 - signal²), is the error of the
velocity, which stays finite there: an objective's loss is always the mean squared error of its target.

Levels are 32-bit whatever the latents are: in bfloat16 the first steps would have up to half as much noise again.

Letters: B clips, C channels, T frames, H W rows and columns.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Objective(ABC):
    """Time t is a float in [0, 1], 0 clean and 1 pure noise, of shape (B,), or (B, T) with a time for every frame;
    latents, noise and outputs of the network are (B, C, T, H, W).

    Results have the dtype of the latents, but at least 32 bits where it is not said otherwise.
    """

    @abstractmethod
    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise in x_t: float32, of the shape of ``t``."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """``t`` in the unit that networks are told: float32 in [0, 1000]."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should say of x_t."""

    @abstractmethod
    def to_clean(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """The clean latents that follow from the network's output."""

    @abstractmethod
    def to_noise(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """The noise that follows from the network's output."""

    def snap(self, t: Tensor) -> Tensor:
        """The times nearest to ``t`` that the objective tells apart: for samplers."""
        return t

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, in the dtype of ``clean``.

        Raises:
            ValueError: if ``t`` is neither (B,) nor (B, T), or ``noise`` has not the shape of ``clean``.
        """
        if noise.shape != clean.shape:
            raise ValueError(f"noise of shape {tuple(noise.shape)} for latents of {tuple(clean.shape)}: draw it alike.")
        signal, level = self._levels_over(clean, t)
        return (signal * _wide(clean) + level * _wide(noise)).to(clean.dtype)

    def _levels_over(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The levels, in a shape that broadcasts over latents (B, C, T, H, W)."""
        signal, noise = self.levels(over_latents(t, latents))
        return signal, noise


class VPrediction(Objective):
    """The velocity signal(t) * noise - noise(t) * clean, in ``num_steps`` discrete steps of noise.

    Of the 1001 times that are told apart, t = 0 is the clean latent and t = (k + 1) / 1000 is step k of the published
    schedule, to which the times above k / 1000 belong as well: t uniform in [0, 1) draws every step equally often.

    Args:
        num_steps: of the schedule.
        beta_start, beta_end: variance that the first and the last step add; their square roots are evenly spaced
            between these ("scaled linear").
        snr_shift: s > 0 divides the signal-to-noise ratio by s: 3 in CogVideoX-2B, 1 in 5B and 1.5.
        zero_terminal_snr: stretch the signal so that the last step has none.

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
            raise ValueError(f"num_steps={num_steps} of a noise schedule: use 2 or more, 1000 as published.")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"beta_start={beta_start} and beta_end={beta_end} must rise, between 0 and 1.")
        if snr_shift <= 0:
            raise ValueError(f"snr_shift={snr_shift} must be above 0: 1 shifts nothing.")
        self.num_steps = num_steps
        variance = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64).square()
        power = (1 - variance).cumprod(0)  # signal²
        power = power / (snr_shift + (1 - snr_shift) * power)
        signal = power.sqrt()
        if zero_terminal_snr:
            signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
        signal = torch.cat([torch.ones(1, dtype=torch.float64), signal])  # time 0
        # noise from the signal in 64 bits: 1 - signal² would keep three digits of the first step's in 32
        self._table = torch.stack([signal, (1 - signal.square()).sqrt()]).float()  # (2, num_steps + 1)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if self._table.device != t.device:
            with torch.inference_mode(False):  # it is kept for later, also for training
                self._table = self._table.to(t.device)
        signal, noise = self._table[:, self._index(t)]
        return signal, noise

    def network_time(self, t: Tensor) -> Tensor:
        """The index of the step, 0 … num_steps - 1, as a float; the clean latent shares 0 with the first step."""
        return (self._index(t) - 1).clamp(min=0).float()

    def snap(self, t: Tensor) -> Tensor:
        return (t * self.num_steps).round() / self.num_steps

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal, level = self._levels_over(clean, t)
        return signal * _wide(noise) - level * _wide(clean)

    def to_clean(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        signal, level = self._levels_over(noisy, t)
        return signal * _wide(noisy) - level * _wide(output)

    def to_noise(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        signal, level = self._levels_over(noisy, t)
        return level * _wide(noisy) + signal * _wide(output)

    def _index(self, t: Tensor) -> Tensor:
        """Place in the table: long, 0 for the clean latent."""
        # 32-bit t * 1000 is off by up to 6e-5, which must not lift k / 1000 to the next step
        return (t.float() * self.num_steps - 1e-3).ceil().long().clamp(0, self.num_steps)


class FlowMatching(Objective):
    """The velocity noise - clean of the straight path x_t = (1 - t) * clean + t * noise; t is continuous."""

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t.float(), t.float()

    def network_time(self, t: Tensor) -> Tensor:
        """1000 t, not rounded."""
        return 1000 * t.float()

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return _wide(noise) - _wide(clean)

    def to_clean(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        _, level = self._levels_over(noisy, t)
        return _wide(noisy) - level * _wide(output)

    def to_noise(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        signal, _ = self._levels_over(noisy, t)
        return _wide(noisy) + signal * _wide(output)


def over_latents(values: Tensor, latents: Tensor) -> Tensor:
    """Values of clips (B,), or of their frames (B, T), in a shape that broadcasts over latents (B, C, T, H, W).

    Raises:
        ValueError: for other shapes.
    """
    if latents.ndim != 5 or tuple(values.shape) not in ((latents.shape[0],), (latents.shape[0], latents.shape[2])):
        raise ValueError(
            f"times of shape {tuple(values.shape)} for latents of {tuple(latents.shape)}: latents are (B, C, T, H, W), "
            "times (B,), one a clip, or (B, T), one a frame."
        )
    return values.view(len(values), 1, -1, 1, 1)


def _wide(x: Tensor) -> Tensor:
    """In 32 bits at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class AddedNoise(Objective):
    """Control objective that must fail: noise of one fixed level is added, and predicted without a timestep.

    The clip stays visible through such noise, so the loss falls; but the network is never trained on pure noise, where
    sampling starts. Not for use.
    """

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t, dtype=torch.float32), (t > 0).float()

    def network_time(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t, dtype=torch.float32)

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise.float()

    def to_clean(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        return noisy.float() - output.float()

    def to_noise(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        return output.float()
