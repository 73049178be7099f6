"""Which noise levels a diffusion model trains on: samplers of times in [0, 1], where 0 is clean and 1 pure noise.

Every sampler turns uniform random numbers into times by a quantile function, so that all can be stratified: numbers
that share [0, 1] among the samples of all ranks make the mean loss vary less (CogVideoX calls it explicit uniform
sampling, arXiv 2408.06072). They are drawn on the CPU, so that a run is repeatable on any device.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


def shift_times(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): moves times (any shape, in [0, 1]) towards noise for s > 1, by an SNR s² times lower in a
    flow (arXiv 2403.03206). 0 and 1 stay.
    """
    return shift * t / (1 + (shift - 1) * t)


class TokenShift:
    """A shift that grows with the size of a clip (Open-Sora 2, arXiv 2503.09642): linear in the tokens of a frame,
    times the square root of the number of frames. Large pictures have more redundant pixels and stand more noise.

    Args:
        low_tokens, low_shift: tokens of a frame, and the shift there,
        high_tokens, high_shift: a second point of the line.

    Raises:
        ValueError: for two points at the same place, or a shift that is not above 0.
    """

    def __init__(self, low_tokens: int = 256, low_shift: float = 1.0, high_tokens: int = 4096, high_shift: float = 3.0):
        if low_tokens >= high_tokens or low_shift <= 0 or high_shift <= 0:
            raise ValueError(
                f"a shift of {low_shift} at low_tokens={low_tokens} and of {high_shift} at high_tokens={high_tokens} "
                "makes no line: the second number of tokens must be larger, both shifts above 0."
            )
        self._low, self._high = (low_tokens, low_shift), (high_tokens, high_shift)

    def __call__(self, grid: tuple[int, int, int]) -> float:
        """The shift of a clip of (t, h, w) tokens.

        Raises:
            ValueError: if the line is at 0 or below for frames this small.
        """
        (low_tokens, low_shift), (high_tokens, high_shift) = self._low, self._high
        slope = (high_shift - low_shift) / (high_tokens - low_tokens)
        shift = low_shift + slope * (grid[1] * grid[2] - low_tokens)
        if shift <= 0:
            raise ValueError(f"the shift of frames of {grid[1]} x {grid[2]} tokens is {shift:.3g}: raise low_shift.")
        return shift * math.sqrt(grid[0])


class TimeSampler(ABC):
    """Draws the times of a batch.

    Args:
        shift: of every time, see :func:`shift_times`; or what computes it from the tokens of a clip.
        stratified: cut [0, 1] into as many equal slices as there are samples on all ranks, rank after rank, and draw
            one number in each. Times of single frames must be independent, and cannot be stratified.

    Raises:
        ValueError: if ``shift`` is not above 0.
    """

    def __init__(self, shift: float | TokenShift = 1.0, stratified: bool = False):
        if not isinstance(shift, TokenShift) and shift <= 0:
            raise ValueError(f"shift={shift} of the times must be above 0: 1 shifts nothing.")
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
        """Times of a batch: float32 (B,), or (B, T) where ``num_frames`` is given: one a frame, independent (Diffusion
        Forcing, arXiv 2407.01392).

        Args:
            batch_size, num_frames: B and T.
            grid: tokens (t, h, w) of a clip, for a shift that depends on them.
            generator: of the random numbers; torch's global one if ``None``.
            rank, world_size: which of how many processes this is, for stratified numbers.

        Raises:
            ValueError: for times of frames from a stratified sampler, or if the shift needs a grid that is not given.
        """
        if num_frames is None:
            uniform = torch.rand(batch_size, generator=generator, dtype=torch.float32)
            if self.stratified:
                first = rank * batch_size
                uniform = (torch.arange(first, first + batch_size) + uniform) / (batch_size * world_size)
        elif self.stratified:
            raise ValueError("stratified=true gives a time to each clip: set it to false for a time to each frame.")
        else:
            uniform = torch.rand(batch_size, num_frames, generator=generator, dtype=torch.float32)
        return shift_times(self._quantile(uniform), self._shift_of(grid))

    @abstractmethod
    def _quantile(self, uniform: Tensor) -> Tensor:
        """The times below which the shares ``uniform`` of all lie."""

    def _shift_of(self, grid: tuple[int, int, int] | None) -> float:
        if not isinstance(self.shift, TokenShift):
            return self.shift
        if grid is None:
            raise ValueError("a TokenShift depends on the size of the clips: call the sampler with their grid.")
        return self.shift(grid)


class UniformTimes(TimeSampler):
    """Every time equally often, before the shift."""

    def _quantile(self, uniform: Tensor) -> Tensor:
        return uniform


class LogitNormalTimes(TimeSampler):
    """Times whose logit is normal: the middle ones most often (Stable Diffusion 3, arXiv 2403.03206).

    Args:
        mean, std: of the logit.
        shift, stratified: see :class:`TimeSampler`.

    Raises:
        ValueError: if ``std`` or ``shift`` is not above 0.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0, shift: float | TokenShift = 1.0, stratified: bool = False):
        super().__init__(shift, stratified)
        if std <= 0:
            raise ValueError(f"std={std} of logit-normal times must be above 0.")
        self.mean, self.std = mean, std

    def _quantile(self, uniform: Tensor) -> Tensor:
        return (self.mean + self.std * torch.special.ndtri(uniform)).sigmoid()
