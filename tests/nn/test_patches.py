"""Patches: parity with loops, round trips, normalization and masked errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blueberry_video.nn.patches import gather_tokens, normalize_patches, patchify, token_mse, unpatchify

small = st.integers(1, 3)


@settings(max_examples=30, deadline=None)
@given(grid=st.tuples(small, small, small), patch_size=st.tuples(small, small, small), channels=small)
def test_unpatchify_inverts_patchify(grid, patch_size, channels):
    video = torch.randn(2, channels, *(n * p for n, p in zip(grid, patch_size, strict=True)))
    patches = patchify(video, patch_size)
    assert patches.shape == (2, grid[0] * grid[1] * grid[2], patch_size[0] * patch_size[1] * patch_size[2], channels)
    assert torch.equal(unpatchify(patches, grid, patch_size), video)


def test_patches_and_their_pixels_are_in_raster_order():
    video = torch.arange(2 * 3 * 4 * 6 * 4.0).view(2, 3, 4, 6, 4)
    patches = patchify(video, (2, 3, 2))
    for n, (t, i, j) in enumerate((t, i, j) for t in range(2) for i in range(2) for j in range(2)):
        for p, (dt, di, dj) in enumerate((dt, di, dj) for dt in range(2) for di in range(3) for dj in range(2)):
            assert torch.equal(patches[:, n, p], video[:, :, 2 * t + dt, 3 * i + di, 2 * j + dj])


def test_normalized_patches_have_zero_mean_and_unit_unbiased_variance_in_each_channel():
    patches = torch.randn(2, 5, 12, 3) * torch.tensor([0.1, 1.0, 10.0]) + torch.tensor([1.0, -2.0, 3.0])
    normalized, mean, std = normalize_patches(patches)
    assert normalized.mean(dim=2).abs().max() < 1e-5
    torch.testing.assert_close(normalized.square().sum(dim=2) / 11, torch.ones(2, 5, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalized * std + mean, patches)
    assert mean.shape == std.shape == (2, 5, 1, 3)


def test_constant_patches_become_zero():
    normalized, mean, std = normalize_patches(torch.full((1, 2, 8, 3), 0.25))
    assert torch.equal(normalized, torch.zeros(1, 2, 8, 3))
    assert mean.unique().item() == 0.25
    assert std.unique().item() == pytest.approx(1e-6)


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-5])
def test_epsilon_is_outside_or_under_the_root(spread):
    values = [0.3, 0.9, 0.2, 0.6]
    mean = sum(values) / 4
    variance = spread**2 * sum((value - mean) ** 2 for value in values) / 3
    patches = spread * torch.tensor(values, dtype=torch.float64).view(1, 1, 4, 1)
    for under, divisor in ((False, variance**0.5 + 1e-6), (True, (variance + 1e-6) ** 0.5)):
        normalized, _, std = normalize_patches(patches, eps_under_root=under)
        assert std.item() == pytest.approx(divisor, rel=1e-10)
        assert normalized.flatten().tolist() == pytest.approx([spread * (v - mean) / divisor for v in values])


def test_mean_squared_error_is_over_all_scored_tokens_of_the_batch():
    predicted, truth = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    scored = torch.tensor([[True, False, True], [False, False, True]])  # two of the first sample, one of the second
    squares = [(predicted[b, n] - truth[b, n]).square() for b, n in ((0, 0), (0, 2), (1, 2))]
    torch.testing.assert_close(token_mse(predicted, truth, scored), torch.cat(squares).sum() / 12)
    torch.testing.assert_close(token_mse(predicted, truth), (predicted - truth).square().sum() / 24)
    predicted[~scored] += 100
    torch.testing.assert_close(token_mse(predicted, truth, scored), torch.cat(squares).sum() / 12)


@pytest.mark.parametrize("trailing", [(), (4,), (4, 3)])
def test_gather_tokens_indexes_each_sample(trailing):
    tokens, index = torch.randn(2, 6, *trailing), torch.tensor([[5, 0, 0], [2, 3, 1]])
    expected = torch.stack([torch.stack([tokens[b, n] for n in index[b].tolist()]) for b in range(2)])
    assert torch.equal(gather_tokens(tokens, index), expected)


def test_joint_normalization_is_over_all_values_of_a_patch_and_none_keeps_the_pixels():
    """OmniMAE's option: mean and unbiased variance over pixels and channels; VideoMAE's: pixels as they are."""
    patches = torch.rand(2, 3, 8, 3) * torch.tensor([1.0, 2.0, 3.0])
    joint = normalize_patches(patches, eps_under_root=True, over="patch")
    flat = patches.flatten(2)
    expected = (flat - flat.mean(dim=2, keepdim=True)) / (flat.var(dim=2, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(joint.patches.flatten(2), expected)
    torch.testing.assert_close(joint.patches * joint.std + joint.mean, patches)
    plain = normalize_patches(patches, over="none")
    assert torch.equal(plain.patches, patches)
    assert torch.equal(plain.patches * plain.std + plain.mean, patches)
    with pytest.raises(ValueError, match="over='clip'"):
        normalize_patches(patches, over="clip")
