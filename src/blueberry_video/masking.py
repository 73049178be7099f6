"""Which tokens a model sees, and which it must predict.

Every mask is a small callable ``masking(batch_size, grid, generator=None) -> Masks``. It draws on the CPU, from
torch's global generator or the one given, so that a run is repeatable on any device and a validation mask need not
disturb training.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Masks(NamedTuple):
    """Token indices in raster order, ascending in each row."""

    keep: Tensor  # (B, N_visible) long: what the encoder sees
    target: Tensor  # (B, N_target) long: what the decoder predicts
    scored: Tensor | None = None  # (B, N_target) bool: which of the targets count in the loss; None: all

    def to(self, device: torch.device) -> "Masks":
        scored = None if self.scored is None else self.scored.to(device, non_blocking=True)
        return Masks(self.keep.to(device, non_blocking=True), self.target.to(device, non_blocking=True), scored)


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


class DualMasking:
    """Hides most tokens from the encoder and spares the decoder half of the places (VideoMAE V2, arXiv 2303.16727).

    The decoder predicts a running cell: of every 2 x 2 places the same number, one step further in every frame, so
    that four frames in a row have each place equally often. It also predicts places that the encoder saw; those do
    not count in the loss. At a grid of 8 x 14 x 14, the tube's 160 tokens are visible, 784 decoded, exactly 704 scored.

    Args:
        encoder: the mask of the encoder, another of this module; ``None`` for the tube of 0.9.
        decoder_ratio: share of the places that are *not* decoded: 0.25, 0.5 or 0.75.

    Raises:
        ValueError: for another ratio; when called, for a grid of odd height or width, or if no token is left to score.
    """

    def __init__(self, encoder: Callable[..., Masks] | None = None, decoder_ratio: float = 0.5):
        if decoder_ratio not in (0.25, 0.5, 0.75):
            nearest = min((0.25, 0.5, 0.75), key=lambda ratio: abs(ratio - decoder_ratio))
            raise ValueError(
                f"masking decoder_ratio={decoder_ratio} is no share of a cell of 2 x 2 places: the nearest that leaves "
                f"some to decode and some not, is {nearest}."
            )
        self.encoder, self.decoder_ratio = encoder or TubeMasking(0.9), decoder_ratio

    def __call__(self, batch_size: int, grid: tuple[int, int, int], generator: torch.Generator | None = None) -> Masks:
        t, h, w = grid
        if h % 2 or w % 2:
            raise ValueError(
                f"DualMasking cannot cut the grid of {t} x {h} x {w} tokens into cells of 2 x 2 places: height and "
                f"width must be even, such as {h + h % 2} x {w + w % 2}. Choose image_size as an even multiple of "
                "patch_size, or another masking."
            )
        keep = self.encoder(batch_size, grid, generator).keep
        start = torch.randint(4, (batch_size, 1, 1, 1), generator=generator)
        frame, i, j = (torch.arange(n).view(shape) for n, shape in zip(grid, ((-1, 1, 1), (-1, 1), (-1,))))
        step = (2 * (i % 2) + j % 2 + start + frame + 1) % 4  # (B, t, h, w)
        decoded = (step >= 4 * self.decoder_ratio).flatten(1)
        target = decoded.nonzero()[:, 1].view(batch_size, -1)  # as many in every frame of every sample
        scored = torch.ones_like(decoded).scatter_(1, keep, False).gather(1, target)
        if not scored.any():
            raise ValueError(
                f"masking decoder_ratio={self.decoder_ratio} leaves no token to score: the encoder sees all of the "
                f"{target.shape[1]} decoded of {t} x {h} x {w}. Hide more from the encoder, or decode more."
            )
        return Masks(keep, target, scored)


class ByModality:
    """One mask for pictures and one for clips, each with its own ratio (OmniMAE, arXiv 2206.08356).

    Its released base model was trained with random masks of 0.75 on pictures and 0.9 on clips.

    Args:
        image: the mask of grids of one frame.
        clip: the mask of all others.
    """

    def __init__(self, image: Callable[..., Masks], clip: Callable[..., Masks]):
        self.image, self.clip = image, clip

    def __call__(self, batch_size: int, grid: tuple[int, int, int], generator: torch.Generator | None = None) -> Masks:
        return (self.image if grid[0] == 1 else self.clip)(batch_size, grid, generator)


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
