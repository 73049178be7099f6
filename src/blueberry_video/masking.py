"""Which tokens a model sees, and which it must predict.

Every mask is a small callable ``masking(batch_size, grid, generator=None) -> Masks``. It draws on the CPU, from
torch's global generator or the one given, so that a run is repeatable on any device and a validation mask need not
disturb training.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Masks(NamedTuple):
    """Token indices in raster order, ascending in each row."""

    keep: Tensor  # (B, N_visible) long: what the encoder sees
    target: Tensor  # (B, N_target) long: what the loss is taken on

    def to(self, device: torch.device) -> "Masks":
        return Masks(self.keep.to(device, non_blocking=True), self.target.to(device, non_blocking=True))


class TubeMasking:
    """The same random places are hidden in every frame (VideoMAE, arXiv 2203.12602), so that no neighbour in time
    gives them away.

    Args:
        ratio: share of each frame's places to hide, in (0, 1); floor(ratio * h * w) of them are.
    """

    def __init__(self, ratio: float = 0.9):
        self.ratio = _checked_ratio(ratio)

    def __call__(self, batch_size: int, grid: tuple[int, int, int], generator: torch.Generator | None = None) -> Masks:
        t, h, w = grid
        keep, target = _random_split(batch_size, h * w, self.ratio, generator)
        frame = torch.arange(t)[:, None] * (h * w)  # (t, 1)
        return Masks(*((frame + places[:, None]).flatten(1) for places in (keep, target)))


class RandomMasking:
    """Hides random tokens of the whole clip, each on its own (OmniMAE, arXiv 2206.08356).

    Args:
        ratio: share of the clip's tokens to hide, in (0, 1); floor(ratio * t * h * w) of them are.
    """

    def __init__(self, ratio: float = 0.9):
        self.ratio = _checked_ratio(ratio)

    def __call__(self, batch_size: int, grid: tuple[int, int, int], generator: torch.Generator | None = None) -> Masks:
        return Masks(*_random_split(batch_size, math.prod(grid), self.ratio, generator))


def _checked_ratio(ratio: float) -> float:
    if not 0 < ratio < 1:
        raise ValueError(
            f"masking ratio={ratio} is outside (0, 1): a model needs something to see and something to predict."
        )
    return ratio


def _random_split(
    batch_size: int, places: int, ratio: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Visible and hidden of ``range(places)``, drawn for each sample."""
    hidden = int(ratio * places)
    if not 0 < hidden < places:
        raise ValueError(
            f"masking ratio={ratio} hides {hidden} of {places} places: at least one must be hidden and one visible; "
            f"use a ratio between {1 / places:.3g} and {1 - 1 / places:.3g}, or smaller patches."
        )
    order = torch.rand(batch_size, places, generator=generator).argsort(dim=1)
    return order[:, hidden:].sort(dim=1).values, order[:, :hidden].sort(dim=1).values
