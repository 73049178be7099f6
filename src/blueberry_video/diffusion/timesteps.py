"""Timestep samplers of training: t in [0, 1], where 0 is clean and 1 is pure noise.

Every sampler maps uniform random numbers by a quantile function, so that all can be stratified: numbers that partition
[0, 1] among the samples of all ranks lower the variance of the mean loss (explicit uniform sampling in CogVideoX, arXiv
2408.06072). Numbers are drawn on the CPU, so that runs are deterministic on any device.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """Returns s t / (1 + (s - 1) t), timesteps in [0, 1] of any shape, shifted towards noise for s > 1.

    For flow matching, it divides the SNR by s² (arXiv 2403.03206). 0 and 1 are unchanged.
    """
    return shift * t / (1 + (shift - 1) * t)


class TokenShift:
    """Timestep shift that grows with the size of a clip (Open-Sora 2, arXiv 2503.09642).

    It is linear in the tokens per frame, times the square root of the number of frames: large frames are more redundant
    and require more noise.

    Args:
        low_tokens, low_shift: tokens per frame and shift of a first point of the line.
        high_tokens, high_shift: a second point.

    Raises:
        ValueError: if high_tokens does not exceed low_tokens, or a shift is not above 0.
    """

    def __init__(self, low_tokens: int = 256, low_shift: float = 1.0, high_tokens: int = 4096, high_shift: float = 3.0):
        if low_tokens >= high_tokens or low_shift <= 0 or high_shift <= 0:
            raise ValueError(
                f"low_tokens={low_tokens} must be below high_tokens={high_tokens}, and low_shift={low_shift} and "
                f"high_shift={high_shift} above 0."
            )
        self._low_tokens, self._low_shift = low_tokens, low_shift
        self._slope = (high_shift - low_shift) / (high_tokens - low_tokens)

    def __call__(self, grid: tuple[int, int, int]) -> float:
        """Returns the shift of a clip with a patch grid (t, h, w).

        Raises:
            ValueError: if the line is not above 0 for frames of this size.
        """
        shift = self._low_shift + self._slope * (grid[1] * grid[2] - self._low_tokens)
        if shift <= 0:
            raise ValueError(f"shift={shift:.3g} for frames of {grid[1]} x {grid[2]} tokens: raise low_shift.")
        return shift * math.sqrt(grid[0])


class TimestepSampler(ABC):
    """Base class of timestep samplers.

    Args:
        shift: see :func:`shift_timesteps`; or a :class:`TokenShift`, which computes it from the patch grid.
        stratified: partition [0, 1] into one slice per sample of all ranks, in order of ranks, and draw one number in
            each. Timesteps per frame must be independent and cannot be stratified.

    Raises:
        ValueError: if ``shift`` is not above 0.
    """

    def __init__(self, shift: float | TokenShift = 1.0, stratified: bool = False):
        if not isinstance(shift, TokenShift) and shift <= 0:
            raise ValueError(f"shift={shift} of the timesteps must be above 0; 1 is no shift.")
        self.shift, self.stratified = shift, stratified

    def __call__(
        self,
        batch_size: int,
        num_frames: int | None = None,
        grid: tuple[int, int, int] | None = None,
        generator: torch.Generator | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> Tensor:
        """Returns timesteps of a batch: float32 (B,), or with ``num_frames`` (B, T), independent for every frame
        (Diffusion Forcing, arXiv 2407.01392).

        Args:
            batch_size, num_frames: B and T.
            grid: patch grid (t, h, w) of a clip, required by a TokenShift.
            generator: random generator; ``None`` for torch's global one.
            rank, world_size: rank of this process and number of processes, for stratified numbers.

        Raises:
            ValueError: for ``num_frames`` with a stratified sampler, or a TokenShift without a grid.
        """
        if num_frames is None:
            uniform = torch.rand(batch_size, generator=generator, dtype=torch.float32)
            if self.stratified:
                first = rank * batch_size
                uniform = (torch.arange(first, first + batch_size) + uniform) / (batch_size * world_size)
        elif self.stratified:
            raise ValueError("stratified=true requires one timestep per clip: set it to false for timesteps per frame.")
        else:
            uniform = torch.rand(batch_size, num_frames, generator=generator, dtype=torch.float32)
        shift = self.shift
        if isinstance(shift, TokenShift):
            if grid is None:
                raise ValueError("a TokenShift depends on the size of the clips: pass their patch grid as `grid`.")
            shift = shift(grid)
        return shift_timesteps(self._quantile(uniform), shift)

    @abstractmethod
    def _quantile(self, uniform: Tensor) -> Tensor:
        """Quantile function of the distribution before the shift."""


class UniformTimesteps(TimestepSampler):
    """Timesteps uniform in [0, 1] before the shift."""

    def _quantile(self, uniform: Tensor) -> Tensor:
        return uniform


class LogitNormalTimesteps(TimestepSampler):
    """Timesteps with a normal logit, which favors the middle (Stable Diffusion 3, arXiv 2403.03206).

    Args:
        mean, std: mean and standard deviation of the logit.
        shift, stratified: see :class:`TimestepSampler`.

    Raises:
        ValueError: if ``std`` or ``shift`` is not above 0.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0, shift: float | TokenShift = 1.0, stratified: bool = False):
        super().__init__(shift, stratified)
        if std <= 0:
            raise ValueError(f"std={std} of the logit-normal distribution must be above 0.")
        self.mean, self.std = mean, std

    def _quantile(self, uniform: Tensor) -> Tensor:
        return (self.mean + self.std * torch.special.ndtri(uniform)).sigmoid()
