"""Token masks for masked prediction.

Every mask is a callable ``masking(batch_size, grid, generator=None) -> Masks``. It draws on the CPU, from the given
generator or torch's global one, so that masks are equal on all devices and validation masks do not affect training.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EVALUATION_MASKS = 32  # masks that clips share in validation
_ATTEMPTS = 100  # draws of blocks that cover the whole grid, before an error is raised


class Masks(NamedTuple):
    """Token indices in raster order, ascending in each row."""

    keep: Tensor  # (B, N_visible) long: input of the encoder
    target: Tensor  # (B, N_target) long: predicted by the decoder
    scored: Tensor | None = None  # (B, N_target) bool: which targets count in the loss; None: all

    def to(self, device: torch.device) -> "Masks":
        scored = None if self.scored is None else self.scored.to(device, non_blocking=True)
        return Masks(self.keep.to(device, non_blocking=True), self.target.to(device, non_blocking=True), scored)


def evaluation_masks(
    masking: Callable[..., Masks], seeds: Sequence[int], grid: tuple[int, int, int], seed: int = 0
) -> Masks:
    """Masks of clips in validation, which do not depend on the batch.

    Each clip has one of 32 masks. They are drawn together, because maskings may draw one shape per batch and truncate
    all masks of a batch to the same number of tokens.

    Args:
        masking: ``(batch_size, grid, generator) -> Masks``.
        seeds: B integers; each selects the mask of a clip.
        grid: number of patches along (t, h, w).
        seed: seed of the masks.
    """
    masks = masking(EVALUATION_MASKS, grid, torch.Generator().manual_seed(seed))
    rows = torch.tensor(seeds, dtype=torch.long) % EVALUATION_MASKS
    return Masks(masks.keep[rows], masks.target[rows], None if masks.scored is None else masks.scored[rows])


class TubeMasking:
    """Tube masking: hides the same random positions in every frame (VideoMAE, arXiv 2203.12602).

    A masked patch is therefore not visible in a neighboring frame either.

    Args:
        ratio: share of each frame's positions to hide, in (0, 1); floor(ratio * h * w) are hidden.
    """

    def __init__(self, ratio: float = 0.9):
        self.ratio = _checked_ratio(ratio)

    def __call__(self, batch_size: int, grid: tuple[int, int, int], generator: torch.Generator | None = None) -> Masks:
        t, h, w = grid
        keep, target = _random_split(batch_size, h * w, self.ratio, generator)
        frame = torch.arange(t)[:, None] * (h * w)  # (t, 1)
        return Masks(*((frame + positions[:, None]).flatten(1) for positions in (keep, target)))


class RandomMasking:
    """Random masking: hides tokens of the whole clip independently (OmniMAE, arXiv 2206.08356).

    Args:
        ratio: share of the clip's tokens to hide, in (0, 1); floor(ratio * t * h * w) are hidden.
    """

    def __init__(self, ratio: float = 0.9):
        self.ratio = _checked_ratio(ratio)

    def __call__(self, batch_size: int, grid: tuple[int, int, int], generator: torch.Generator | None = None) -> Masks:
        return Masks(*_random_split(batch_size, math.prod(grid), self.ratio, generator))


class FrameMasking:
    """Frame masking: hides whole random frames (an ablation of OmniMAE, arXiv 2206.08356).

    Args:
        ratio: share of the frames of tokens to hide, in (0, 1); floor(ratio * t) are hidden.
    """

    def __init__(self, ratio: float = 0.9):
        self.ratio = _checked_ratio(ratio)

    def __call__(self, batch_size: int, grid: tuple[int, int, int], generator: torch.Generator | None = None) -> Masks:
        t, h, w = grid
        inside = torch.arange(h * w)
        frames = _random_split(batch_size, t, self.ratio, generator)
        return Masks(*((each[..., None] * (h * w) + inside).flatten(1) for each in frames))


class CausalMasking:
    """Causal masking: hides the last tokens in raster order (an ablation of OmniMAE, arXiv 2206.08356).

    The first hidden frame may be visible in part: 1,411 of the 1,568 tokens of 8 x 14 x 14 are hidden at a ratio of
    0.9, which are 7 frames and 39 tokens.

    Args:
        ratio: share of the clip's tokens to hide, in (0, 1); floor(ratio * t * h * w) are hidden.
    """

    def __init__(self, ratio: float = 0.9):
        self.ratio = _checked_ratio(ratio)

    def __call__(self, batch_size: int, grid: tuple[int, int, int], generator: torch.Generator | None = None) -> Masks:
        tokens = math.prod(grid)
        every = torch.arange(tokens).expand(batch_size, -1)
        return Masks(*every.tensor_split([tokens - _checked_count(self.ratio, tokens)], dim=1))


class DualMasking:
    """Dual masking: an encoder mask, and running-cell masking of the decoder (VideoMAE V2, arXiv 2303.16727).

    The decoder predicts a fixed number of every 2 x 2 positions, shifted by one position per frame, so that four
    consecutive frames cover each position equally often. It also predicts positions that the encoder receives; those
    do not count in the loss. For a grid of 8 x 14 x 14 and a tube of 0.9, 160 tokens are visible, 784 are decoded and
    exactly 704 are scored.

    Args:
        encoder: mask of the encoder; ``None`` for ``TubeMasking(0.9)``.
        decoder_ratio: share of the positions that are *not* decoded: 0.25, 0.5 or 0.75.

    Raises:
        ValueError: for a different ratio; when called, for a grid of odd height or width, or if no token is scored.
    """

    def __init__(self, encoder: Callable[..., Masks] | None = None, decoder_ratio: float = 0.5):
        if decoder_ratio not in (0.25, 0.5, 0.75):
            nearest = min((0.25, 0.5, 0.75), key=lambda ratio: abs(ratio - decoder_ratio))
            raise ValueError(
                f"masking decoder_ratio={decoder_ratio} must be 0.25, 0.5 or 0.75, a share of 2 x 2 "
                f"positions: use {nearest}."
            )
        self.encoder, self.decoder_ratio = encoder or TubeMasking(0.9), decoder_ratio

    def __call__(self, batch_size: int, grid: tuple[int, int, int], generator: torch.Generator | None = None) -> Masks:
        t, h, w = grid
        if h % 2 or w % 2:
            raise ValueError(
                f"DualMasking requires a grid of even height and width, which the {t} x {h} x {w} tokens are not: use "
                f"{h + h % 2} x {w + w % 2}, with image_size an even multiple of patch_size, or a different masking."
            )
        keep = self.encoder(batch_size, grid, generator).keep
        start = torch.randint(4, (batch_size, 1, 1, 1), generator=generator)
        frame, i, j = (torch.arange(n).view(shape) for n, shape in zip(grid, ((-1, 1, 1), (-1, 1), (-1,))))
        step = (2 * (i % 2) + j % 2 + start + frame + 1) % 4  # (B, t, h, w)
        decoded = (step >= 4 * self.decoder_ratio).flatten(1)
        target = decoded.nonzero()[:, 1].view(batch_size, -1)  # equally many in every frame of every sample
        scored = torch.ones_like(decoded).scatter_(1, keep, False).gather(1, target)
        if not scored.any():
            raise ValueError(
                f"masking decoder_ratio={self.decoder_ratio} leaves no token to score: all {target.shape[1]} decoded "
                f"tokens of the grid {t} x {h} x {w} are visible. Raise the encoder's ratio or lower decoder_ratio."
            )
        return Masks(keep, target, scored)


class ByModality:
    """Separate masks for images and clips, each with its own ratio (OmniMAE, arXiv 2206.08356).

    The published base model was trained with random masks of 0.75 on images and 0.9 on clips.

    Args:
        image: mask for grids of one frame.
        clip: mask for longer grids.
    """

    def __init__(self, image: Callable[..., Masks], clip: Callable[..., Masks]):
        self.image, self.clip = image, clip

    def __call__(self, batch_size: int, grid: tuple[int, int, int], generator: torch.Generator | None = None) -> Masks:
        return (self.image if grid[0] == 1 else self.clip)(batch_size, grid, generator)


class MultiBlockMasking:
    """Multi-block masking: hides a union of blocks, each a rectangle over many frames (V-JEPA, arXiv 2404.08471).

    V-JEPA trains with two at once: 8 blocks of 0.15 of the frame (short range) and 2 of 0.7 (long range), both over
    the whole length. On 14 x 14 positions they hide 0.63 and 0.81 of the clip. All blocks of a batch have one size,
    drawn per batch; their positions are drawn per sample. Samples then hide different numbers of tokens, so targets
    and context are both truncated to the smallest number in the batch: some tokens are in neither.

    Args:
        num_blocks: number of blocks per sample.
        spatial_scale: share of a frame's positions that a block covers, in (0, 1]; rounded to whole rows and columns.
        temporal_scale: share of the frames that a block covers, in (0, 1]; rounded down, at least one frame.
        aspect_ratio: range of height over width, drawn uniformly.
        truncate: tokens that are kept: ``"prefix"``, the first in raster order, as published, which drops the last
            frames; or ``"random"``.
        max_keep: largest number of visible tokens; ``None``: no limit.
        max_temporal_keep: share of the frames that may be visible, in (0, 1]; later frames are hidden.
        complement: after truncation, ``"target"`` predicts all tokens that are not visible, ``"context"`` shows all
            tokens that are not predicted; ``None``: some tokens are in neither. V-JEPA 2 names them
            ``full_complement`` and ``pred_full_complement``.
        inverse: the blocks are visible and the rest is predicted; ``inv_block`` in V-JEPA 2.

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
        max_keep: int | None = None,
        max_temporal_keep: float = 1.0,
        complement: str | None = None,
        inverse: bool = False,
    ):
        if num_blocks < 1:
            raise ValueError(f"masking num_blocks={num_blocks} must be at least 1; V-JEPA uses 8 and 2.")
        if complement not in (None, "target", "context") or (max_keep is not None and max_keep < 1):
            raise ValueError(
                f"masking complement={complement!r} must be null, 'target' or 'context', and max_keep={max_keep} null "
                "or at least 1."
            )
        scales = {"spatial_scale": spatial_scale, "temporal_scale": temporal_scale}
        for key, scale in (scales | {"max_temporal_keep": max_temporal_keep}).items():
            if not 0 < scale <= 1:
                raise ValueError(f"masking {key}={scale} must be in (0, 1], a share of the clip.")
        low, high = aspect_ratio
        if not 0 < low <= high:
            raise ValueError(f"masking aspect_ratio={[low, high]} must be two positive numbers in ascending order.")
        if truncate not in ("prefix", "random"):
            raise ValueError(f"masking truncate={truncate!r} must be 'prefix' or 'random'.")
        self.num_blocks, self.spatial_scale, self.temporal_scale = num_blocks, spatial_scale, temporal_scale
        self.aspect_ratio, self.truncate = (low, high), truncate
        self.max_keep, self.max_temporal_keep, self.complement, self.inverse = (
            max_keep,
            max_temporal_keep,
            complement,
            inverse,
        )

    def __call__(self, batch_size: int, grid: tuple[int, int, int], generator: torch.Generator | None = None) -> Masks:
        hidden, tokens = self.draw(batch_size, grid, generator), math.prod(grid)
        keep, target = self._cut(~hidden, generator, self.max_keep), self._cut(hidden, generator)
        if self.complement == "target":
            target = _others(keep, tokens)
        elif self.complement == "context":
            keep = _others(target, tokens)
        return Masks(target, keep) if self.inverse else Masks(keep, target)

    def draw(
        self, batch_size: int, grid: tuple[int, int, int], generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Returns the tokens that the blocks cover, not all in any sample: bool (B, t * h * w), before truncation."""
        size = self.block_size(grid, generator)
        hidden = self._union(batch_size, grid, size, generator)
        for _ in range(_ATTEMPTS):
            full = hidden.all(dim=1)
            if not full.any():
                return hidden
            hidden[full] = self._union(int(full.sum()), grid, size, generator)
        raise self._no_context(grid, size)

    def block_size(self, grid: tuple[int, int, int], generator: torch.Generator | None = None) -> tuple[int, int, int]:
        """Draws the frames, rows and columns of the blocks of one batch: smaller than the whole grid."""
        t, h, w = grid
        low, high = self.aspect_ratio
        frames, area = max(1, int(t * self.temporal_scale)), int(h * w * self.spatial_scale)
        for _ in range(_ATTEMPTS):
            ratio = low + (high - low) * torch.rand((), generator=generator).item()
            rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            size = (frames, min(max(rows, 1), h), min(max(columns, 1), w))
            if size != grid:
                return size
        raise self._no_context(grid, grid)

    def _union(
        self, samples: int, grid: tuple[int, int, int], size: tuple[int, int, int], generator: torch.Generator | None
    ) -> Tensor:
        """Union of blocks of one size at random positions: bool (samples, t * h * w)."""
        inside = []
        for axis, (length, extent) in enumerate(zip(grid, size, strict=True)):
            start = torch.randint(length - extent + 1, (samples, self.num_blocks, 1), generator=generator)
            offset = torch.arange(length) - start  # (samples, blocks, length)
            shape = [samples, self.num_blocks, 1, 1, 1]
            shape[2 + axis] = length
            inside.append(((offset >= 0) & (offset < extent)).view(shape))
        hidden = (inside[0] & inside[1] & inside[2]).any(dim=1)  # (samples, t, h, w)
        hidden[:, max(1, int(grid[0] * self.max_temporal_keep)) :] = True
        return hidden.flatten(1)

    def _cut(self, chosen: Tensor, generator: torch.Generator | None, most: int | None = None) -> Tensor:
        """Indices of the true entries of (B, N), truncated to the smallest number in any row and to ``most``."""
        rows, tokens = chosen.shape
        if self.truncate == "random":
            order = torch.rand(rows, tokens, generator=generator).argsort(dim=1)
        else:
            order = torch.arange(tokens).expand(rows, -1)
        fewest = min(int(chosen.sum(dim=1).min()), most or tokens)
        return order.masked_fill(~chosen, tokens).argsort(dim=1)[:, :fewest].sort(dim=1).values

    def _no_context(self, grid: tuple[int, int, int], size: tuple[int, int, int]) -> ValueError:
        (t, h, w), (frames, rows, columns) = grid, size
        return ValueError(
            f"masking num_blocks={self.num_blocks} with spatial_scale={self.spatial_scale} leaves no context: "
            f"blocks of {frames} x {rows} x {columns} tokens cover the whole grid of {t} x {h} x {w}. Use fewer or "
            "smaller blocks, or smaller patches."
        )


def _others(index: Tensor, tokens: int) -> Tensor:
    """Indices in [0, ``tokens``) that are not in ``index`` (B, K): (B, tokens - K), ascending."""
    others = torch.ones(len(index), tokens, dtype=torch.bool).scatter_(1, index, False)
    return others.nonzero()[:, 1].view(len(index), -1)


def _checked_ratio(ratio: float) -> float:
    if not 0 < ratio < 1:
        raise ValueError(f"masking ratio={ratio} must be in (0, 1), to leave tokens to encode and tokens to predict.")
    return ratio


def _random_split(
    batch_size: int, positions: int, ratio: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Splits ``range(positions)`` into visible and hidden indices at random for each sample."""
    hidden = _checked_count(ratio, positions)
    order = torch.rand(batch_size, positions, generator=generator).argsort(dim=1)
    return order[:, hidden:].sort(dim=1).values, order[:, :hidden].sort(dim=1).values


def _checked_count(ratio: float, positions: int) -> int:
    """Number of hidden positions."""
    hidden = int(ratio * positions)
    if not 0 < hidden < positions:
        raise ValueError(
            f"masking ratio={ratio} hides {hidden} of {positions} positions, but at least one must be hidden and one "
            f"visible: use a ratio from {1 / positions:.3g} to {1 - 1 / positions:.3g}, or smaller patches."
        )
    return hidden


def corrupt_frames(
    ids: Tensor, vocabulary: int, substitute: float, generators: Sequence[torch.Generator] | None = None
) -> tuple[Tensor, Tensor]:
    """Masks a random share of the tokens of each frame, and replaces some of the visible ones by random codes.

    The share is cos(π u / 2) with u uniform in [0, 1), as in MaskGIT (arXiv 2202.04200), drawn for each frame; at least
    one token is masked.

    Args:
        ids: Codes (B, t, h, w) long, in [0, vocabulary).
        vocabulary: Number of codes, and the id of the mask.
        substitute: Share of visible tokens that are replaced.
        generators: One CPU generator per clip, so that the corruption of a clip does not depend on its batch; ``None``
            for torch's global one.

    Returns:
        Corrupted ids (B, t, h, w), and the masked positions, bool.

    Raises:
        ValueError: If the number of generators is not B.
    """
    if generators is None:
        return _corrupted(ids, vocabulary, substitute, None)
    if len(generators) != len(ids):
        raise ValueError(f"{len(generators)} generators for {len(ids)} clips: pass one per clip.")
    parts = [_corrupted(clip[None], vocabulary, substitute, each) for clip, each in zip(ids, generators)]
    corrupted, masked = zip(*parts, strict=True)
    return torch.cat(corrupted), torch.cat(masked)


def _corrupted(
    ids: Tensor, vocabulary: int, substitute: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """:func:`corrupt_frames` of one batch, drawn on the CPU."""
    (batch, frames), tokens = ids.shape[:2], ids[0, 0].numel()
    share = torch.cos(math.pi / 2 * torch.rand(batch, frames, 1, generator=generator))
    count = (share * tokens).ceil().clamp(min=1)
    rank = torch.rand(batch, frames, tokens, generator=generator).argsort(dim=2).argsort(dim=2)
    replaced = torch.rand(batch, frames, tokens, generator=generator) < substitute
    codes = torch.randint(vocabulary, (batch, frames, tokens), generator=generator)
    masked, replaced, codes = ((part.view(ids.shape)).to(ids.device) for part in (rank < count, replaced, codes))
    return torch.where(replaced, codes, ids).masked_fill(masked, vocabulary), masked
