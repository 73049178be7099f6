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

_ATTEMPTS = 100  # how often blocks are drawn anew where they cover everything, before that counts as an error


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


class MultiBlockMasking:
    """Hides the union of several blocks, each a rectangle of places over many frames (V-JEPA, arXiv 2404.08471).

    V-JEPA trains on two of these at once: 8 blocks of 0.15 of the picture (short range) and 2 of 0.7 (long range), both
    over the whole length. At 14 x 14 places they hide 0.63 and 0.81 of the clip. All blocks of a batch have one size,
    drawn anew for each batch; their places are drawn for each sample. Since samples then hide different numbers of
    tokens, targets and context are both cut to the fewest of the batch: some tokens are neither.

    Args:
        num_blocks: blocks a sample.
        spatial_scale: share of a frame's places that a block covers, in (0, 1]; rounded to whole rows and columns.
        temporal_scale: share of the frames that it covers, in (0, 1]; rounded down, one at least.
        aspect_ratio: range of height over width, drawn uniformly.
        truncate: which tokens stay where there are too many: ``"prefix"``, the first in raster order, as published,
            which drops the last frames; or ``"random"`` ones.

    Raises:
        ValueError: for values outside these ranges; when called, if the blocks leave no context.
    """

    def __init__(
        self,
        num_blocks: int = 8,
        spatial_scale: float = 0.15,
        temporal_scale: float = 1.0,
        aspect_ratio: tuple[float, float] = (0.75, 1.5),
        truncate: str = "prefix",
    ):
        if num_blocks < 1:
            raise ValueError(f"masking num_blocks={num_blocks} hides nothing: use 1 or more; V-JEPA uses 8 and 2.")
        for key, scale in (("spatial_scale", spatial_scale), ("temporal_scale", temporal_scale)):
            if not 0 < scale <= 1:
                raise ValueError(f"masking {key}={scale} is no share of the clip: use a number in (0, 1].")
        low, high = aspect_ratio
        if not 0 < low <= high:
            raise ValueError(f"masking aspect_ratio={[low, high]} is no range: give two positive numbers, ascending.")
        if truncate not in ("prefix", "random"):
            raise ValueError(f"masking truncate={truncate!r} is unknown: choose 'prefix' or 'random'.")
        self.num_blocks, self.spatial_scale, self.temporal_scale = num_blocks, spatial_scale, temporal_scale
        self.aspect_ratio, self.truncate = (low, high), truncate

    def __call__(self, batch_size: int, grid: tuple[int, int, int], generator: torch.Generator | None = None) -> Masks:
        hidden = self.draw(batch_size, grid, generator)
        return Masks(keep=self._cut(~hidden, generator), target=self._cut(hidden, generator))

    def draw(
        self, batch_size: int, grid: tuple[int, int, int], generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Which tokens the blocks cover: bool (B, t * h * w), before any are cut off; some are left in each sample."""
        size = self.block_size(grid, generator)
        hidden = self._union(batch_size, grid, size, generator)
        for _ in range(_ATTEMPTS):
            full = hidden.all(dim=1)
            if not full.any():
                return hidden
            hidden[full] = self._union(int(full.sum()), grid, size, generator)
        raise self._no_context(grid, size)

    def block_size(self, grid: tuple[int, int, int], generator: torch.Generator | None = None) -> tuple[int, int, int]:
        """Frames, rows and columns of the blocks of one batch: less than the whole grid."""
        t, h, w = grid
        low, high = self.aspect_ratio
        frames, places = max(1, int(t * self.temporal_scale)), int(h * w * self.spatial_scale)
        for _ in range(_ATTEMPTS):
            ratio = low + (high - low) * torch.rand((), generator=generator).item()
            rows, columns = round(math.sqrt(places * ratio)), round(math.sqrt(places / ratio))
            size = (frames, min(max(rows, 1), h), min(max(columns, 1), w))
            if size != grid:
                return size
        raise self._no_context(grid, grid)

    def _union(
        self, samples: int, grid: tuple[int, int, int], size: tuple[int, int, int], generator: torch.Generator | None
    ) -> Tensor:
        """Blocks of one size at random places: bool (samples, t * h * w)."""
        inside = []
        for axis, (length, extent) in enumerate(zip(grid, size, strict=True)):
            start = torch.randint(length - extent + 1, (samples, self.num_blocks, 1), generator=generator)
            offset = torch.arange(length) - start  # (samples, blocks, length)
            shape = [samples, self.num_blocks, 1, 1, 1]
            shape[2 + axis] = length
            inside.append(((offset >= 0) & (offset < extent)).view(shape))
        return (inside[0] & inside[1] & inside[2]).any(dim=1).flatten(1)

    def _cut(self, chosen: Tensor, generator: torch.Generator | None) -> Tensor:
        """Indices of the true ones of (B, N), as many in each row as the row with the fewest has."""
        rows, tokens = chosen.shape
        if self.truncate == "random":
            order = torch.rand(rows, tokens, generator=generator).argsort(dim=1)
        else:
            order = torch.arange(tokens).expand(rows, -1)
        fewest = int(chosen.sum(dim=1).min())
        return order.masked_fill(~chosen, tokens).argsort(dim=1)[:, :fewest].sort(dim=1).values

    def _no_context(self, grid: tuple[int, int, int], size: tuple[int, int, int]) -> ValueError:
        (t, h, w), (frames, rows, columns) = grid, size
        return ValueError(
            f"masking num_blocks={self.num_blocks} with spatial_scale={self.spatial_scale} leaves no context: its "
            f"blocks of {frames} x {rows} x {columns} tokens cover the whole grid of {t} x {h} x {w}. Use fewer or "
            "smaller blocks, or smaller patches."
        )


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
