"""Patch discriminator of videos, for the adversarial loss of the tokenizer."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Scores patches of videos (B, 3, T, H, W) in [-1, 1]: (B, 1, t, h, w), high for real ones.

    Strided 3-D convolutions with LeakyReLU, as PatchGAN (Isola et al., arXiv 1611.07004) in space and time. Group
    normalization instead of batch normalization: scores do not depend on the batch, nor on the number of processes.
    Time is padded at the start only, so that a single frame has a score.

    Args:
        dims: width of each layer; each halves rows and columns, all but the first also frames.
    """

    def __init__(self, dims: Sequence[int] = (64, 128, 256)):
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        width = 3
        for layer, dim in enumerate(dims):
            self.convs.append(
                nn.Conv3d(width, dim, (3, 4, 4), stride=(1 if layer == 0 else 2, 2, 2), padding=(0, 1, 1))
            )
            self.norms.append(nn.GroupNorm(1, dim) if layer else nn.Identity())
            width = dim
        self.score = nn.Conv3d(width, 1, 1)

    def forward(self, video: Tensor) -> Tensor:
        x = video
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.pad(x, (0, 0, 0, 0, 2, 0), mode="replicate")
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return self.score(x)
