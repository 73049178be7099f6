"""Position tables."""

import torch
from torch import Tensor


def sinusoid_table(num_positions: int, dim: int) -> Tensor:
    """Fixed 1-D sinusoid (num_positions, dim), float32: sine on even, cosine on odd channels, interleaved.

    Channel j of position p has the angle p / 10000^(2 floor(j / 2) / dim). For a video, p is the index of the token
    in the flattened (t, h, w) raster: this is the table of VideoMAE, not a 3-D one (Vaswani et al., arXiv
    1706.03762).
    """
    position = torch.arange(num_positions, dtype=torch.float64)[:, None]
    channel = torch.arange(dim, dtype=torch.float64)
    angle = position / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()
