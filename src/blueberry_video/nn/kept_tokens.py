"""Tokens of videos whose frames are encoded each by itself, also where frames keep different numbers of them.

Shapes: B batch, T frames of S places, N kept tokens of a video, K the most that any frame keeps, D width.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from blueberry_video.nn.patches import gather_tokens


class KeptTokens:
    """Which tokens of a batch of videos are there, frame by frame.

    Args:
        keep: (B, N) indices of the tokens in (t, h, w) raster, in any order, none twice.
        batch: B.
        grid: (t, h, w).

    Attributes:
        most: K, the most tokens that a frame of the batch has.

    Raises:
        ValueError: for a ``keep`` that is not that: of another batch, another type, empty, outside the grid, with a
            token twice.
    """

    def __init__(self, keep: Tensor, batch: int, grid: tuple[int, int, int]):
        frames, h, w = grid
        if keep.ndim != 2 or len(keep) != batch or keep.dtype == torch.bool or keep.is_floating_point():
            raise ValueError(
                f"keep is a {keep.dtype} tensor of shape {tuple(keep.shape)}: it must hold the indices of the visible "
                f"tokens, (B, N_kept) whole numbers with B = {batch}."
            )
        if not keep.shape[1]:
            raise ValueError("keep is empty: at least one token of each video must be visible.")
        ordered, self._order = keep.long().sort(dim=1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ValueError("keep names a token twice: it must hold different indices in each row.")
        if ordered.min() < 0 or ordered.max() >= frames * h * w:
            raise ValueError(
                f"keep names tokens from {int(ordered.min())} to {int(ordered.max())}, but a video of {frames} x {h} x "
                f"{w} tokens has those from 0 to {frames * h * w - 1}."
            )
        self.frames = frames
        self._frame, self._place = ordered // (h * w), ordered % (h * w)  # (B, N)
        counts = ordered.new_zeros(batch, frames).scatter_add_(1, self._frame, torch.ones_like(ordered))
        first = counts.cumsum(dim=1) - counts  # (B, T): tokens of the frames before
        self._counts = counts
        self.most = int(counts.max())
        rank = torch.arange(ordered.shape[1], device=keep.device) - first.gather(1, self._frame)
        self._slot = self._frame * self.most + rank  # (B, N): where a token stands in (B, T * K)

    def encode(self, video: Tensor, encoder: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Every frame by itself, and of it the kept tokens alone: (B, C, T, H, W) -> (B, T, K, D), zeros where a frame
        has fewer.

        Args:
            video: the frames.
            encoder: frames (n, C, 1, H, W) and indices (n, k) of their tokens -> (n, k, D). It is called once for
                every number of tokens that frames have: attention must not reach what fills up the shorter ones.
        """
        frames, counts = rearrange(video, "b c t h w -> (b t) c 1 h w"), self._counts.flatten()
        places = self._spread(self._place[..., None]).flatten(0, 1)[..., 0]  # (B T, K)
        rows, parts = [], []
        for count in counts.unique().tolist():
            if count:
                row = (counts == count).nonzero()[:, 0]
                tokens = encoder(frames[row], places[row, :count])
                rows.append(row)
                parts.append(torch.nn.functional.pad(tokens, (0, 0, 0, self.most - count)))
        found = torch.cat(parts)
        out = found.new_zeros(len(frames), *found.shape[1:]).index_copy(0, torch.cat(rows), found)
        return out.unflatten(0, (-1, self.frames))

    def valid(self) -> Tensor | None:
        """Which of (B, T, K) are tokens, bool; ``None`` if all are."""
        if (self._counts == self.most).all():
            return None
        return torch.arange(self.most, device=self._counts.device) < self._counts[..., None]

    def pick(self, tokens: Tensor) -> Tensor:
        """(B, T, K, D) -> (B, N, D), in the order of ``keep``."""
        return gather_tokens(tokens.flatten(1, 2), self._slot.gather(1, self._order.argsort(dim=1)))

    def _spread(self, tokens: Tensor) -> Tensor:
        """(B, N, …) in raster order -> (B, T, K, …)."""
        flat = tokens.new_zeros(len(tokens), self.frames * self.most, *tokens.shape[2:])
        index = self._slot.reshape(*self._slot.shape, *[1] * (tokens.ndim - 2)).expand_as(tokens)
        return flat.scatter(1, index, tokens).unflatten(1, (self.frames, self.most))
