"""3-D rotary position embedding of V-JEPA 2 (arXiv 2506.09985; github.com/facebookresearch/vjepa2) and of diffusion
transformers.

In V-JEPA 2, time, row and column rotate d = 2 * (head_dim // 3 // 2) channels of a head each; the remaining channels
are not rotated. Positions come from token indices, so masked tokens cost nothing, and a different video size needs no
interpolation.

Channels (2i, 2i + 1) form a pair that rotates with frequency i. The published weights were trained with channel c at
frequency c mod d/2 instead (sines and cosines tiled over the d channels of an axis, pairs interleaved), so that the two
channels of a pair rotate at different rates. This *quirk* is kept to run these weights.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from blueberry_video.nn.positions import PositionTables

THETA = 10000.0  # frequency i of an axis with d channels is THETA ** (-2i / d) radians per position


class Rotation(NamedTuple):
    """Cosines and sines of the rotation angles, (N, head_dim) or, per sample, (B, 1, N, head_dim)."""

    cos: Tensor
    sin: Tensor


def channels_per_axis(head_dim: int) -> int:
    """Number of channels d of a head that each axis rotates: 64 -> 20, 80 -> 26, 32 -> 10.

    Raises:
        ValueError: if ``head_dim`` is odd or below 6, one pair of channels per axis.
    """
    if head_dim < 6 or head_dim % 2:
        raise ValueError(
            "3-D rotary position embedding requires an even head_dim of at least 6, one pair of channels per axis, not "
            f"head_dim={head_dim}: change embed_dim or num_heads."
        )
    return 2 * (head_dim // 3 // 2)


def grid_positions(grid: tuple[int, int, int]) -> Tensor:
    """Positions (time, row, column) of the tokens of a grid (t, h, w): float64 (t * h * w, 3), in raster order."""
    return torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in grid)).view(-1, 3)


def rotation(positions: Tensor, head_dim: int, quirk: bool = False) -> Rotation:
    """Rotation at (time, row, column) positions: (..., 3) -> (..., head_dim), in the dtype of ``positions``.

    Positions may be fractional. An axis at 0 is not rotated: a token with a position in time only is at (t, 0, 0).
    ``quirk`` selects the frequencies of the published weights, see :mod:`.rope`.

    Raises:
        ValueError: see :func:`channels_per_axis`.
    """
    dim = channels_per_axis(head_dim)
    frequency = torch.arange(dim // 2, dtype=positions.dtype, device=positions.device)
    frequency = THETA ** (-2 * frequency / dim)
    channels = frequency.repeat(2) if quirk else frequency.repeat_interleave(2)  # (d,)
    angles = (positions[..., None] * channels).flatten(-2)  # (..., 3 d)
    angles = nn.functional.pad(angles, (0, head_dim - 3 * dim))  # the remaining channels are not rotated
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Rotates queries or keys (B, heads, N, head_dim); keeps their dtype."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    swapped = torch.stack((odd, even), dim=-1).flatten(-2)
    # the sign is applied to the table, which has no heads: fewer passes over x
    sin = torch.stack((-turn.sin[..., ::2], turn.sin[..., 1::2]), dim=-1).flatten(-2)
    return torch.addcmul(x * turn.cos, swapped, sin).to(x.dtype)


class RotaryPositions(PositionTables):
    """Cached rotation table of a clip with the token grid (t, h, w), also used for shorter clips of the same size.

    The table is not part of the state dict. ``head_dim`` and ``quirk`` are those of :func:`rotation`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, grid: tuple[int, int, int], head_dim: int, quirk: bool = False):
        super().__init__()
        self.grid, self.head_dim, self.quirk = grid, head_dim, quirk
        self.register_tables()

    def tables(self) -> dict[str, Tensor]:
        return self._table(self.grid)._asdict()

    def forward(self, index: Tensor | None = None, grid: tuple[int, int, int] | None = None) -> Rotation:
        """Rotation of the tokens ``index`` (B, N) in raster order, by default all, of a clip with ``grid``."""
        cos, sin = self.cos, self.sin
        if grid is not None and grid != self.grid:
            if grid[1:] == self.grid[1:] and grid[0] <= self.grid[0]:  # time is outermost: a prefix of the table
                cos, sin = cos[: math.prod(grid)], sin[: math.prod(grid)]
            else:
                cos, sin = (part.to(cos) for part in self._table(grid))
        if index is None:
            return Rotation(cos, sin)
        return Rotation(cos[index][:, None], sin[index][:, None])

    def _table(self, grid: tuple[int, int, int]) -> Rotation:
        cos, sin = rotation(grid_positions(grid), self.head_dim, self.quirk)
        return Rotation(cos.float(), sin.float())


def axes_rotation(positions: Tensor, axis_dims: tuple[int, int, int], theta: float = 10000.0) -> Rotation:
    """Rotation at (time, row, column) positions with separate widths per axis: (..., 3) -> (..., head_dim).

    Positions are float, may be fractional, and set the dtype. Pair i of an axis with d channels has frequency
    theta ** (-2 i / d). A token at (0, 0, 0), such as a text token, is not rotated.

    Args:
        positions: (..., 3).
        axis_dims: channels rotated by time, row and column; their sum is ``head_dim``.
        theta: base of the frequencies.

    Raises:
        ValueError: if an axis has an odd number of channels.
    """
    if any(dim % 2 for dim in axis_dims):
        raise ValueError(f"axis_dims={axis_dims} must be even: the channels of an axis rotate in pairs.")
    angles = []
    for axis, dim in enumerate(axis_dims):
        exponent = torch.arange(0, dim, 2, dtype=positions.dtype, device=positions.device) / dim
        angles.append(positions[..., axis, None] * theta**-exponent)
    angle = torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)  # (..., head_dim)
    return Rotation(angle.cos(), angle.sin())
