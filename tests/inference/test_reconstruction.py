"""Reconstructions: visible patches untouched, predicted ones with their true mean and standard deviation, the rest
black.
"""

import pytest
import torch
from torch import Tensor

from blueberry_video.inference.reconstruction import hide, reconstruct
from blueberry_video.masking import DualMasking, RandomMasking
from blueberry_video.models.masked_autoencoder.model import MaskedAutoencoder
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.nn.patches import gather_tokens, normalize_patches, patchify

PATCH, GRID = (2, 4, 4), (2, 2, 2)


def encoder(**changes) -> VisionTransformer:
    sizes = {"image_size": 8, "num_frames": 4, "patch_size": 4, "tubelet_size": 2, "embed_dim": 4, "num_heads": 1}
    return VisionTransformer(**{**sizes, "depth": 0, **changes})


class Predicts(MaskedAutoencoder):
    """Predicts what the test gives it."""

    def __init__(self, prediction: Tensor):
        super().__init__(encoder(), 4, 0, 1)
        self.prediction = prediction

    def forward(self, video: Tensor, keep: Tensor, target: Tensor) -> Tensor:
        return gather_tokens(self.prediction, target)


def case() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(2, 3, 4, 8, 8, generator=generator)
    keep, target, _ = RandomMasking(0.6)(2, GRID, generator)
    return video, keep, target


def test_a_perfect_prediction_gives_the_video_back():
    video, keep, target = case()
    truth = normalize_patches(patchify(video, PATCH)).patches.flatten(2)
    filled = reconstruct(Predicts(truth), video, video, keep, target)
    torch.testing.assert_close(filled, video, atol=1e-6, rtol=0)
    assert not filled.requires_grad


def test_predicting_zero_gives_the_true_mean_of_each_hidden_patch_and_visible_ones_exactly():
    video, keep, target = case()
    filled = patchify(reconstruct(Predicts(torch.zeros(2, 8, 96)), video, video, keep, target), PATCH)
    patches = patchify(video, PATCH)
    assert torch.equal(gather_tokens(filled, keep), gather_tokens(patches, keep))
    expected = gather_tokens(patches, target).mean(dim=2, keepdim=True).expand(-1, -1, 32, -1)
    torch.testing.assert_close(gather_tokens(filled, target), expected)


def test_predicting_one_lies_one_true_standard_deviation_higher():
    video, keep, target = case()
    video = 0.4 + 0.1 * video
    filled = patchify(reconstruct(Predicts(torch.ones(2, 8, 96)), video, video, keep, target), PATCH)
    hidden = gather_tokens(patchify(video, PATCH), target)
    expected = (hidden.mean(dim=2) + hidden.std(dim=2))[:, :, None].expand(-1, -1, 32, -1)
    torch.testing.assert_close(gather_tokens(filled, target), expected, atol=1e-5, rtol=0)


def test_a_wild_prediction_stays_in_the_range_of_pixels():
    video, keep, target = case()
    filled = reconstruct(Predicts(100 * torch.randn(2, 8, 96)), video, video, keep, target)
    assert filled.min() == 0
    assert filled.max() == 1


def test_the_model_sees_the_normalised_video_and_fills_the_given_one():
    model = MaskedAutoencoder(encoder(embed_dim=8, depth=1), decoder_dim=8, decoder_depth=1, decoder_num_heads=1).eval()
    video, keep, target = case()
    inputs = (video - 0.5) / 0.25
    filled = patchify(reconstruct(model, video, inputs, keep, target), PATCH)
    _, mean, std = (gather_tokens(x, target) for x in normalize_patches(patchify(video, PATCH)))
    expected = (model(inputs, keep, target).view(2, -1, 32, 3) * std + mean).clamp(0, 1)
    torch.testing.assert_close(gather_tokens(filled, target), expected)


def test_places_neither_seen_nor_predicted_are_black():
    """With dual masking: and what is both seen and predicted stays as it was seen."""
    video = case()[0] + 0.01
    keep, target, _ = DualMasking(RandomMasking(0.6))(2, GRID, torch.Generator().manual_seed(1))
    truth = normalize_patches(patchify(video, PATCH)).patches.flatten(2)
    filled = patchify(reconstruct(Predicts(1 + truth), video, video, keep, target), PATCH)
    patches = patchify(video, PATCH)
    kinds = set()
    for b in range(2):
        for n in range(8):
            seen, asked = n in keep[b].tolist(), n in target[b].tolist()
            kinds.add((seen, asked))
            if seen:
                assert torch.equal(filled[b, n], patches[b, n].clamp(0, 1))
            else:
                assert (filled[b, n] != 0).any() == asked
    assert len(kinds) == 4


def test_a_single_frame_comes_back_as_one():
    video, keep, target = torch.rand(2, 3, 1, 8, 8), torch.tensor([[0, 3], [1, 2]]), torch.tensor([[1, 2], [0, 3]])
    model = Predicts(torch.zeros(2, 4, 96))
    model.encoder = encoder(images=True)
    twice = patchify(video.expand(-1, -1, 2, -1, -1), PATCH)
    model.prediction = normalize_patches(twice).patches.flatten(2)
    torch.testing.assert_close(reconstruct(model, video, video, keep, target), video, atol=1e-6, rtol=0)
    seen = hide(model.encoder, video, keep)
    assert seen.shape == video.shape
    assert torch.equal(seen[0, :, :, :4, :4], video[0, :, :, :4, :4])
    assert not seen[0, :, :, :4, 4:].any()


def test_hidden_patches_are_black():
    video, keep, target = case()
    patches = patchify(hide(encoder(), video, keep), PATCH)
    assert not gather_tokens(patches, target).any()
    assert torch.equal(gather_tokens(patches, keep), gather_tokens(patchify(video, PATCH), keep))


@pytest.mark.parametrize(("shape", "patch_size"), [((1, 1, 4, 8, 8), (2, 8, 8)), ((1, 3, 2, 2, 2), (1, 1, 1))])
def test_the_video_given_stays_as_it_was(shape, patch_size):
    """For these sizes patches and video could share their memory."""
    video = torch.rand(shape)
    before = video.clone()
    _, channels, frames, size, _ = shape
    small = encoder(
        image_size=size,
        num_frames=frames,
        patch_size=patch_size[1],
        tubelet_size=patch_size[0],
        in_channels=channels,
    )
    hide(small, video, torch.tensor([[1]]))
    assert torch.equal(video, before)
