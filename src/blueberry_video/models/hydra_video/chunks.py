"""Chunks of the tokens of a frame, and the cache of the scan from which one chunk is evaluated at a time."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

Granularity = str | int | tuple[int, int]


@dataclass(frozen=True)
class Chunks:
    """Partition of a frame of tokens into rectangles of equal size, in raster order.

    Args:
        frame: Rows and columns (h, w) of the frame.
        size: Rows and columns of a chunk.

    Raises:
        ValueError: If the chunks do not tile the frame.
    """

    frame: tuple[int, int]
    size: tuple[int, int]

    def __post_init__(self) -> None:
        for key, total, value in zip(("rows", "columns"), self.frame, self.size):
            if value < 1 or total % value:
                raise ValueError(
                    f"granularity with chunks of {self.size[0]} x {self.size[1]} tokens does not tile a frame of "
                    f"{self.frame[0]} x {self.frame[1]}: {key}={value} must divide {total}, use "
                    f"{nearest_divisor(total, value)}."
                )

    @classmethod
    def of(cls, granularity: Granularity, frame: tuple[int, int]) -> "Chunks":
        """Returns the chunks of a frame (h, w).

        Args:
            granularity: ``"token"``, ``"row"``, ``"frame"``, a number of full rows, or (rows, columns).
            frame: (h, w).

        Raises:
            ValueError: For an unknown granularity, or chunks that do not tile the frame.
        """
        named = {"token": (1, 1), "row": (1, frame[1]), "frame": frame}
        if isinstance(granularity, str) and granularity in named:
            return cls(frame, named[granularity])
        size = (granularity, frame[1]) if isinstance(granularity, int) else granularity
        if isinstance(size, str) or isinstance(granularity, bool) or len(size) != 2:
            raise ValueError(
                f"granularity={granularity!r} is unknown: choose 'token', 'row', 'frame', a number of rows, or "
                "(rows, columns)."
            )
        return cls(frame, cast(tuple[int, int], tuple(size)))

    def __len__(self) -> int:
        return self.frame[0] // self.size[0] * (self.frame[1] // self.size[1])

    def rectangle(self, index: int) -> tuple[slice, slice]:
        """Rows and columns of a chunk.

        Raises:
            IndexError: For an index out of range.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index={index} of a chunk must be from 0 to {len(self) - 1}.")
        (rows, columns), per_row = self.size, self.frame[1] // self.size[1]
        top, left = index // per_row * rows, index % per_row * columns
        return slice(top, top + rows), slice(left, left + columns)

    def positions(self) -> Tensor:
        """Raster positions (chunks, q) of the tokens of every chunk, long."""
        raster = torch.arange(self.frame[0] * self.frame[1]).view(self.frame)
        return torch.stack([raster[self.rectangle(index)].flatten() for index in range(len(self))])

    def check_block(self, block: tuple[int, int]) -> None:
        """Checks that each chunk is one contiguous range, of equal length, of every scanned block that it intersects.

        Blocks are scanned row by row. A chunk of several rows must consist of whole rows of blocks; the rows and
        columns of chunk and block must divide each other.

        Raises:
            ValueError: Otherwise.
        """
        (rows, columns), (bh, bw) = self.size, block
        nested = all(big % small == 0 for small, big in (sorted((rows, bh)), sorted((columns, bw))))
        if not nested or (rows > 1 and columns % bw):
            raise ValueError(
                f"granularity with chunks of {rows} x {columns} tokens does not fit scan_blocks={bh} x {bw}: a chunk "
                "must be one contiguous range of every block. Use 'frame', 'token', a number of rows that divides "
                f"{bh} or is a multiple of it, or a part of one row that divides {bw} columns or is a multiple of them."
            )

    def tokens_in(self, block: tuple[int, int]) -> int:
        """Number of tokens that a chunk has in each block that it intersects."""
        return min(self.size[0], block[0]) * min(self.size[1], block[1])

    def blocks(self, index: int, block: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of the blocks that a chunk intersects."""
        rows, columns = self.rectangle(index)
        first = rows.start // block[0], columns.start // block[1]
        return (
            slice(first[0], first[0] + max(1, self.size[0] // block[0])),
            slice(first[1], first[1] + max(1, self.size[1] // block[1])),
        )

    def rank_in_block(self, index: int, block: tuple[int, int]) -> int:
        """Rank of a chunk among the chunks of the blocks that it intersects."""
        rows, columns = self.rectangle(index)
        before = rows.start % block[0] * block[1] + columns.start % block[1]
        return before // self.tokens_in(block)


@dataclass
class ScanCache:
    """Cache of one frame in a Hydra Video mixer, for blocks in nh rows and nw columns of a frame.

    Attributes:
        chunks: Partition of the frame.
        inputs: Inputs of the convolution with zero padding, (B, kt, kh - 1 + h, kw - 1 + w, channels), the frame last.
        left: Running forward states (B, nh, nw, H, P, N).
        right: Backward states that enter each chunk of a block from the right, (B, nh, nw, chunks, H, P, N).
    """

    chunks: Chunks
    inputs: Tensor
    left: Tensor
    right: Tensor


def nearest_divisor(total: int, value: int) -> int:
    """Divisor of ``total`` that is nearest to ``value``, the smaller of two."""
    return min((n for n in range(1, total + 1) if total % n == 0), key=lambda n: (abs(n - value), n))
