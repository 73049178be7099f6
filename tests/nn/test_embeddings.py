"""Patch embedding: parity of the masked matrix product with the convolution."""

import torch

from blueberry_video.nn.embeddings import TubeletEmbed
from blueberry_video.nn.patches import gather_tokens


def test_masked_patches_equal_the_convolution_at_the_visible_tokens():
    embed, video = TubeletEmbed(3, 8, (2, 4, 2)), torch.randn(2, 3, 4, 8, 6)
    tokens = embed(video)
    assert tokens.shape == (2, 2 * 2 * 3, 8)
    torch.testing.assert_close(tokens[:, 3], embed.proj(video)[:, :, 0, 1, 0])
    keep = torch.tensor([[11, 0, 4], [3, 7, 2]])
    torch.testing.assert_close(embed(video, keep), gather_tokens(tokens, keep), atol=1e-5, rtol=1e-5)
