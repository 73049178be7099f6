"""Embeddings as images."""

import torch

from blueberry_video.inference.embedding_pictures import latent_pictures
from blueberry_video.models.jepa.model import JEPA
from blueberry_video.models.vit import VisionTransformer


def test_images_of_embeddings():
    encoder = VisionTransformer(16, 4, 8, 2, embed_dim=12, depth=1, num_heads=2, positions="rope_3d")
    model = JEPA(encoder, predictor_dim=12, predictor_depth=1, predictor_num_heads=2).eval()
    video, latents = torch.rand(3, 3, 4, 16, 16), torch.randn(3, 8, 12)
    latents[0, 5] = latents[1, 2]
    keep, target = torch.tensor([[0, 3, 5]]).expand(3, -1), torch.tensor([[1, 2, 4, 6]]).expand(3, -1)
    clip, seen, wanted, got = latent_pictures(model, video, video, latents, keep, target)
    assert all(image.shape == video.shape for image in (clip, seen, wanted, got))
    assert 0 <= wanted.min() < wanted.max() <= 1

    def token(image: torch.Tensor, row: int, index: int) -> torch.Tensor:
        t, i, j = index // 4, index // 2 % 2, index % 2
        return image[row, :, 2 * t : 2 * t + 2, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8]

    assert (token(wanted, 0, 6) == token(wanted, 0, 6)[:, :1, :1, :1]).all()  # one color per token
    torch.testing.assert_close(token(wanted, 0, 5), token(wanted, 1, 2))  # equal embeddings have equal colors
    for index in range(8):
        is_predicted = index in (1, 2, 4, 6)
        assert torch.equal(token(wanted, 2, index), token(got, 2, index)) != is_predicted
        assert torch.equal(token(seen, 2, index), token(video, 2, index)) == (index in (0, 3, 5))
