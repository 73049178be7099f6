"""Visible tokens of videos with independently encoded frames, which may keep different numbers of tokens.

Shapes: B batch, T frames, N kept tokens of a video, K the maximum kept in any frame, D width.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from blueberry_video.nn.patches import gather_tokens


class KeptTokens:
    """Visible tokens of a batch of videos, grouped by frame.

    Args:
        keep: (B, N) distinct indices of the tokens in (t, h, w) raster, in any order.
        batch: B.
        grid: (t, h, w).

    Raises:
        ValueError: if ``keep`` has a wrong batch size or dtype, is empty, or has an index outside the grid or twice.
    """

    def __init__(self, keep: Tensor, batch: int, grid: tuple[int, int, int]):
        frames, h, w = grid
        if keep.ndim != 2 or len(keep) != batch or keep.dtype == torch.bool or keep.is_floating_point():
            raise ValueError(
                f"keep is a {keep.dtype} tensor of shape {tuple(keep.shape)}: it must hold the indices of the visible "
                f"tokens, integers (B, N_kept) with B = {batch}."
            )
        if not keep.shape[1]:
            raise ValueError(f"keep of shape {tuple(keep.shape)} is empty: keep at least one token of each video.")
        ordered, self._order = keep.long().sort(dim=1)
        repeated = ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]].tolist()
        if repeated:
            raise ValueError(f"keep has index {repeated[0]} twice in a row: the indices of a video must be distinct.")
        if ordered.min() < 0 or ordered.max() >= frames * h * w:
            raise ValueError(
                f"keep has indices from {int(ordered.min())} to {int(ordered.max())}, but those of {frames} x {h} x "
                f"{w} tokens go from 0 to {frames * h * w - 1}."
            )
        self._frames = frames
        frame, position = ordered // (h * w), ordered % (h * w)  # (B, N)
        counts = ordered.new_zeros(batch, frames).scatter_add_(1, frame, torch.ones_like(ordered))  # (B, T)
        self._counts, self._max = counts, int(counts.max())
        rank = torch.arange(ordered.shape[1], device=keep.device) - (counts.cumsum(dim=1) - counts).gather(1, frame)
        self._slot = frame * self._max + rank  # (B, N): index of a token in (B, T * K)
        flat = position.new_zeros(batch, frames * self._max).scatter(1, self._slot, position)
        self._positions = flat.view(-1, self._max)  # (B T, K): positions within the frame, padded with 0

    def encode(self, video: Tensor, encoder: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Encodes the kept tokens of each frame separately: (B, C, T, H, W) -> (B, T, K, D), padded with zeros.

        ``encoder`` maps frames (n, C, 1, H, W) and indices (n, k) of their tokens to (n, k, D). It is called once per
        number of tokens in a frame, so that attention never reaches padding.
        """
        frames, counts = rearrange(video, "b c t h w -> (b t) c 1 h w"), self._counts.flatten()
        rows, parts = [], []
        for count in counts.unique().tolist():
            if count:
                row = (counts == count).nonzero()[:, 0]
                tokens = encoder(frames[row], self._positions[row, :count])
                rows.append(row)
                parts.append(torch.nn.functional.pad(tokens, (0, 0, 0, self._max - count)))
        found = torch.cat(parts)
        out = found.new_zeros(len(frames), *found.shape[1:]).index_copy(0, torch.cat(rows), found)
        return out.unflatten(0, (-1, self._frames))

    def valid(self) -> Tensor | None:
        """Padding mask, bool (B, T, K), true at tokens; ``None`` without padding."""
        if (self._counts == self._max).all():
            return None
        return torch.arange(self._max, device=self._counts.device) < self._counts[..., None]

    def pick(self, tokens: Tensor) -> Tensor:
        """Removes padding: (B, T, K, D) -> (B, N, D), in the order of ``keep``."""
        return gather_tokens(tokens.flatten(1, 2), self._slot.gather(1, self._order.argsort(dim=1)))
