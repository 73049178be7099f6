"""3-D rotary positions of V-JEPA 2 (arXiv 2506.09985; github.com/facebookresearch/vjepa2).

Unusual about them: a head's channels are split in three, for time, row and column, with 2 * (head_dim // 3 // 2)
channels each; what is left over at the end is not rotated. A token's place comes from its index, so hidden tokens cost
nothing, and other sizes of video need no interpolation.

Pairs of neighbouring channels (2i, 2i + 1) turn together, both with frequency i. The published weights were trained
with channel c at frequency c mod d/2 instead (sines and cosines tiled over the axis' d channels, pairs interleaved), so
that the two channels of a pair turn at different rates. That is the *quirk*, kept to run those weights.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

THETA = 10000.0  # frequency i of an axis with d channels turns by THETA ** (-2i / d) a step


class Rotation(NamedTuple):
    """What to turn queries and keys by: cosines and sines (N, head_dim), or (B, 1, N, head_dim) for each sample."""

    cos: Tensor
    sin: Tensor


def channels_per_axis(head_dim: int) -> int:
    """Channels d of a head that each of time, row and column turns: 64 -> 20, 80 -> 26, 32 -> 10.

    Raises:
        ValueError: if the head is too narrow for a pair an axis, or its channels make no pairs.
    """
    if head_dim < 6 or head_dim % 2:
        raise ValueError(
            f"3-D rotary positions need heads of an even width of 6 or more, a pair of channels an axis, not of "
            f"{head_dim}: choose another embed_dim or num_heads."
        )
    return 2 * (head_dim // 3 // 2)


def grid_positions(grid: tuple[int, int, int]) -> Tensor:
    """Time, row and column of every token of a grid (t, h, w): float64 (t * h * w, 3), in raster order."""
    return torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in grid)).view(-1, 3)


def rotation(positions: Tensor, head_dim: int, quirk: bool = False) -> Rotation:
    """The rotation of tokens at (time, row, column), which need not be whole numbers: (..., 3) -> (..., head_dim).

    It has the precision of ``positions``. An axis at 0 is not turned: a token with a place in time alone is at (t, 0,
    0).

    Args:
        positions: (..., 3).
        head_dim: channels of a head.
        quirk: the published one, see above.

    Raises:
        ValueError: see :func:`channels_per_axis`.
    """
    dim = channels_per_axis(head_dim)
    frequency = torch.arange(dim // 2, dtype=positions.dtype, device=positions.device)
    frequency = THETA ** (-2 * frequency / dim)
    channels = frequency.repeat(2) if quirk else frequency.repeat_interleave(2)  # (d,)
    angles = (positions[..., None] * channels).flatten(-2)  # (..., 3 d)
    angles = nn.functional.pad(angles, (0, head_dim - 3 * dim))  # what is left over turns by 0
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Turns queries or keys (B, heads, N, head_dim) by the positions of their tokens; keeps their dtype."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    swapped = torch.stack((odd, even), dim=-1).flatten(-2)
    # the sign goes to the table, which has no heads: fewer passes over x
    sin = torch.stack((-turn.sin[..., ::2], turn.sin[..., 1::2]), dim=-1).flatten(-2)
    return torch.addcmul(x * turn.cos, swapped, sin).to(x.dtype)


class RotaryPositions(nn.Module):
    """Gives the rotation of the tokens of a clip. The table of one grid is kept, outside of the state dict, and
    serves shorter clips of the same size, too.

    Args:
        grid: tokens along (t, h, w) of the usual clip.
        head_dim: channels of a head.
        quirk: see :func:`rotation`.

    Raises:
        ValueError: see :func:`channels_per_axis`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, grid: tuple[int, int, int], head_dim: int, quirk: bool = False):
        super().__init__()
        self.grid, self.head_dim, self.quirk = grid, head_dim, quirk
        table = self._table(grid)
        self.register_buffer("cos", table.cos, persistent=False)
        self.register_buffer("sin", table.sin, persistent=False)

    def forward(self, index: Tensor | None = None, grid: tuple[int, int, int] | None = None) -> Rotation:
        """The rotation of the tokens ``index`` (B, N), (t, h, w) raster, of a clip of ``grid``; of all, if ``None``."""
        cos, sin = self.cos, self.sin
        if grid is not None and grid != self.grid:
            if grid[1:] == self.grid[1:] and grid[0] <= self.grid[0]:  # time is outermost: the first tokens
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
    """The rotation of tokens at (time, row, column), which need not be whole numbers: (..., 3) -> (..., head_dim).

    Pair i of an axis with d channels turns by theta ** (-2 i / d) a step. A token at (0, 0, 0), such as one of the
    text, is not turned. It has the precision of ``positions``.

    Args:
        positions: (..., 3), float.
        axis_dims: channels that time, row and column turn; their sum is ``head_dim``.
        theta: base of the frequencies.

    Raises:
        ValueError: if an axis has an odd number of channels.
    """
    if any(dim % 2 for dim in axis_dims):
        raise ValueError(f"axis_dims={axis_dims} must be even: the channels of an axis turn in pairs.")
    angles = []
    for axis, dim in enumerate(axis_dims):
        exponent = torch.arange(0, dim, 2, dtype=positions.dtype, device=positions.device) / dim
        angles.append(positions[..., axis, None] * theta**-exponent)
    angle = torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)  # (..., head_dim)
    return Rotation(angle.cos(), angle.sin())
