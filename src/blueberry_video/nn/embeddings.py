"""Patch embedding of videos."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from blueberry_video.nn.patches import gather_tokens


class TubeletEmbed(nn.Module):
    """Patch embedding by a strided 3-D convolution over non-overlapping (t, h, w) patches.

    (B, C, T, H, W) -> (B, T/t * H/h * W/w, dim), time outermost; with patch indices ``keep`` (B, N_kept), only these:
    (B, N_kept, dim).
    """

    def __init__(self, in_channels: int, dim: int, patch_size: tuple[int, int, int]):
        super().__init__()
        self.proj = nn.Conv3d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, video: Tensor, keep: Tensor | None = None) -> Tensor:
        if keep is None:
            return rearrange(self.proj(video), "b d t h w -> b (t h w) d")
        # A matrix product, which skips the masked patches: at a mask ratio of 0.9 a tenth of the work
        pt, ph, pw = self.proj.kernel_size
        pattern = "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)"
        patches = gather_tokens(rearrange(video, pattern, pt=pt, ph=ph, pw=pw), keep)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
