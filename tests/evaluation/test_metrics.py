"""Accuracies and the shuffle control."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blueberry_video.evaluation.metrics import accuracy, shuffle_frames, within_pair_correct


def test_accuracy_is_a_share():
    logits = torch.tensor([[0.1, 0.9, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 5.0], [1.0, 0.0, 0.0]])
    assert accuracy(logits, torch.tensor([1, 0, 2, 2])).item() == 0.75


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 30))
def test_within_pairs_equals_loops(seed, count):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 6, generator=generator)
    labels = torch.randint(6, (count,), generator=generator)
    pairs = ((0, 3), (5, 2))
    partner = {0: 3, 3: 0, 5: 2, 2: 5}
    expected = [
        logits[i, label] > logits[i, partner[label]] for i, label in enumerate(labels.tolist()) if label in partner
    ]
    correct = within_pair_correct(logits, labels, pairs)
    assert correct.dtype == torch.bool
    assert sorted(correct.tolist()) == sorted(bool(x) for x in expected)


def test_other_classes_do_not_count_within_a_pair():
    logits = torch.tensor([[1.0, 0.0, 99.0], [1.0, 0.0, 99.0]])
    assert within_pair_correct(logits, torch.tensor([0, 1]), ((0, 1),)).tolist() == [True, False]
    assert accuracy(logits, torch.tensor([0, 1])).item() == 0


def test_clips_of_no_pair_give_an_empty_result():
    assert within_pair_correct(torch.randn(3, 4), torch.tensor([3, 3, 2]), ((0, 1),)).shape == (0,)


def test_a_model_blind_to_order_gets_half():
    """The same logits for a clip and its reversal: one of the two is right, always."""
    logits = torch.randn(50, 4).repeat(2, 1)
    labels = torch.cat([torch.zeros(50), torch.ones(50)]).long()
    assert within_pair_correct(logits, labels, ((0, 1),)).float().mean().item() == 0.5


def test_shuffled_clips_hold_the_same_frames_in_an_order_of_their_own():
    video = torch.arange(4 * 3 * 8 * 2 * 2.0).view(4, 3, 8, 2, 2)
    shuffled = shuffle_frames(video, torch.Generator().manual_seed(0))
    orders = []
    for clip, original in zip(shuffled, video, strict=True):
        order = [next(s for s in range(8) if torch.equal(clip[:, t], original[:, s])) for t in range(8)]
        assert sorted(order) == list(range(8))
        orders.append(tuple(order))
    assert len(set(orders)) == 4
    assert tuple(range(8)) not in orders


def test_every_order_is_equally_likely():
    video = torch.arange(3.0).view(1, 1, 3, 1, 1).expand(6000, 1, 3, 1, 1)
    orders = shuffle_frames(video, torch.Generator().manual_seed(0)).flatten(1)
    _, counts = orders.unique(dim=0, return_counts=True)
    assert len(counts) == 6
    assert counts.min() > 880  # 1000 expected, standard deviation 29


def test_shuffling_with_a_generator_leaves_the_global_one_as_it_was():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    video = torch.randn(2, 3, 8, 2, 2, generator=torch.Generator().manual_seed(1))
    first = shuffle_frames(video, torch.Generator().manual_seed(2))
    assert torch.equal(first, shuffle_frames(video, torch.Generator().manual_seed(2)))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, shuffle_frames(video, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_shuffling_keeps_the_dtype(dtype):
    assert shuffle_frames(torch.zeros(1, 3, 4, 2, 2, dtype=dtype)).dtype == dtype
