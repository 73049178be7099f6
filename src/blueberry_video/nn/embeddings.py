"""From pixels to tokens."""

from einops import rearrange
from torch import Tensor, nn


class TubeletEmbed(nn.Module):
    """Cuts a video into non-overlapping (t, h, w) patches and projects each to a token: one strided 3-D convolution.

    (B, C, T, H, W) -> (B, T/t * H/h * W/w, dim), time outermost.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: tuple[int, int, int]):
        super().__init__()
        self.proj = nn.Conv3d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, video: Tensor) -> Tensor:
        return rearrange(self.proj(video), "b d t h w -> b (t h w) d")
