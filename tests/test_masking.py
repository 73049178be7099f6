"""Masks: counts, complement, order, and what they draw from."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from blueberry_video.masking import RandomMasking, TubeMasking

grids = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
ratios = st.floats(0.05, 0.95)


def hidden_of(kind, ratio: float, grid: tuple[int, int, int]) -> tuple[int, int]:
    """Hidden tokens expected, and the number of places they are drawn from."""
    t, h, w = grid
    places = h * w if kind is TubeMasking else t * h * w
    return int(ratio * places) * (t if kind is TubeMasking else 1), places


@pytest.mark.parametrize("kind", [TubeMasking, RandomMasking])
@settings(max_examples=60, deadline=None)
@given(grid=grids, ratio=ratios, batch=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_masks_split_the_tokens_in_two_ascending_halves(kind, grid, ratio, batch, seed):
    expected, places = hidden_of(kind, ratio, grid)
    assume(0 < int(ratio * places) < places)
    keep, target = kind(ratio)(batch, grid, torch.Generator().manual_seed(seed))
    tokens = grid[0] * grid[1] * grid[2]
    assert target.shape == (batch, expected)
    assert keep.shape == (batch, tokens - expected)
    assert keep.dtype == target.dtype == torch.long
    for b in range(batch):
        assert sorted(keep[b].tolist() + target[b].tolist()) == list(range(tokens))
        assert keep[b].tolist() == sorted(keep[b].tolist())
        assert target[b].tolist() == sorted(target[b].tolist())


def test_the_tube_of_videomae_leaves_160_of_1568():
    keep, target = TubeMasking(0.9)(3, (8, 14, 14))
    assert keep.shape == (3, 160)
    assert target.shape == (3, 1408)


def test_a_tube_hides_the_same_places_in_every_frame_and_others_in_every_sample():
    keep, target = TubeMasking(0.75)(4, (5, 6, 7), torch.Generator().manual_seed(0))
    for tokens in (keep, target):
        places = tokens.view(4, 5, -1) - 42 * torch.arange(5)[:, None]
        assert torch.equal(places, places[:, :1].expand_as(places))
    assert len(torch.unique(keep, dim=0)) == 4


def test_random_masks_differ_between_frames():
    keep, _ = RandomMasking(0.5)(1, (4, 6, 6), torch.Generator().manual_seed(0))
    frames = [frozenset((keep[0][keep[0] // 36 == t] % 36).tolist()) for t in range(4)]
    assert len(set(frames)) == 4


@pytest.mark.parametrize("kind", [TubeMasking, RandomMasking])
def test_every_place_is_hidden_equally_often(kind):
    _, target = kind(0.25)(4000, (1, 2, 4), torch.Generator().manual_seed(0))
    share = target.flatten().bincount(minlength=8) / 4000
    assert (share - 0.25).abs().max() < 0.03  # more than 4 standard deviations


@pytest.mark.parametrize("kind", [TubeMasking, RandomMasking])
def test_a_generator_decides_alone_and_leaves_the_global_one_as_it_was(kind):
    masking, grid = kind(0.5), (2, 4, 4)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = masking(2, grid, torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = masking(2, grid, torch.Generator().manual_seed(7))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(masking(2, grid, torch.Generator().manual_seed(8)).keep, first.keep)


@pytest.mark.parametrize("kind", [TubeMasking, RandomMasking])
def test_without_a_generator_the_global_seed_decides(kind):
    masking = kind(0.5)
    torch.manual_seed(3)
    first, other = masking(2, (2, 4, 4)), masking(2, (2, 4, 4))
    torch.manual_seed(3)
    assert torch.equal(masking(2, (2, 4, 4)).keep, first.keep)
    assert not torch.equal(other.keep, first.keep)


@pytest.mark.parametrize("kind", [TubeMasking, RandomMasking])
@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5])
def test_a_ratio_outside_is_refused(kind, ratio):
    with pytest.raises(ValueError, match=f"masking ratio={ratio} is outside"):
        kind(ratio)


@pytest.mark.parametrize(("kind", "places"), [(TubeMasking, 4), (RandomMasking, 8)])
def test_a_grid_too_coarse_for_the_ratio_is_refused(kind, places):
    with pytest.raises(ValueError, match=f"masking ratio=0.1 hides 0 of {places} places: .* or smaller patches"):
        kind(0.1)(1, (2, 2, 2))
