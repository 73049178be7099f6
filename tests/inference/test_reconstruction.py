"""Reconstructions: visible patches are unchanged, predicted ones get their true mean and standard deviation, and the
rest is black.
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
    """Masked autoencoder with a fixed prediction."""

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


def test_perfect_prediction_reconstructs_the_video():
    video, keep, target = case()
    truth = normalize_patches(patchify(video, PATCH)).patches.flatten(2)
    filled = reconstruct(Predicts(truth), video, video, keep, target)
    torch.testing.assert_close(filled, video, atol=1e-6, rtol=0)
    assert not filled.requires_grad


def test_predicting_zero_gives_the_mean_of_hidden_patches_and_keeps_visible_ones():
    video, keep, target = case()
    filled = patchify(reconstruct(Predicts(torch.zeros(2, 8, 96)), video, video, keep, target), PATCH)
    patches = patchify(video, PATCH)
    assert torch.equal(gather_tokens(filled, keep), gather_tokens(patches, keep))
    expected = gather_tokens(patches, target).mean(dim=2, keepdim=True).expand(-1, -1, 32, -1)
    torch.testing.assert_close(gather_tokens(filled, target), expected)


def test_predicting_one_adds_one_standard_deviation():
    video, keep, target = case()
    video = 0.4 + 0.1 * video
    filled = patchify(reconstruct(Predicts(torch.ones(2, 8, 96)), video, video, keep, target), PATCH)
    hidden = gather_tokens(patchify(video, PATCH), target)
    expected = (hidden.mean(dim=2) + hidden.std(dim=2))[:, :, None].expand(-1, -1, 32, -1)
    torch.testing.assert_close(gather_tokens(filled, target), expected, atol=1e-5, rtol=0)


def test_reconstruction_is_clamped_to_the_range_of_pixels():
    video, keep, target = case()
    filled = reconstruct(Predicts(100 * torch.randn(2, 8, 96)), video, video, keep, target)
    assert filled.min() == 0
    assert filled.max() == 1


def test_model_receives_the_normalized_video():
    model = MaskedAutoencoder(encoder(embed_dim=8, depth=1), decoder_dim=8, decoder_depth=1, decoder_num_heads=1).eval()
    video, keep, target = case()
    inputs = (video - 0.5) / 0.25
    filled = patchify(reconstruct(model, video, inputs, keep, target), PATCH)
    _, mean, std = (gather_tokens(x, target) for x in normalize_patches(patchify(video, PATCH)))
    expected = (model(inputs, keep, target).view(2, -1, 32, 3) * std + mean).clamp(0, 1)
    torch.testing.assert_close(gather_tokens(filled, target), expected)


def test_patches_neither_visible_nor_predicted_are_black():
    """With dual masking, patches that are both visible and predicted are unchanged."""
    video = case()[0] + 0.01
    keep, target, _ = DualMasking(RandomMasking(0.6))(2, GRID, torch.Generator().manual_seed(1))
    truth = normalize_patches(patchify(video, PATCH)).patches.flatten(2)
    filled = patchify(reconstruct(Predicts(1 + truth), video, video, keep, target), PATCH)
    patches = patchify(video, PATCH)
    kinds = set()
    for b in range(2):
        for n in range(8):
            is_visible, is_predicted = n in keep[b].tolist(), n in target[b].tolist()
            kinds.add((is_visible, is_predicted))
            if is_visible:
                assert torch.equal(filled[b, n], patches[b, n].clamp(0, 1))
            else:
                assert (filled[b, n] != 0).any() == is_predicted
    assert len(kinds) == 4


def test_single_frame_is_reconstructed_as_one_frame():
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
def test_hide_is_not_in_place(shape, patch_size):
    """For these sizes, patches and video could share memory."""
    video = torch.rand(shape)
    before = video.clone()
    _, channels, frames, size, _ = shape
    small = encoder(
        image_size=size, num_frames=frames, patch_size=patch_size[1], tubelet_size=patch_size[0], in_channels=channels
    )
    hide(small, video, torch.tensor([[1]]))
    assert torch.equal(video, before)
