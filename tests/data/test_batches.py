"""Batches of mixtures: one part each, in the shares asked for, the same from any place and on any number of ranks."""

from collections import Counter

import pytest
import torch

from blueberry_video.data.batches import (
    MixedEvaluationBatches,
    MixedTrainBatches,
    TrainBatches,
    apportion,
    at_epoch,
    collate,
)
from blueberry_video.data.world import World

SIZES = {"image": 100, "clip": 37, "few": 9}
STARTS = {"image": 0, "clip": 100, "few": 137}


def mixed(shares=(0.5, 0.3, 0.2), batch_size: int = 4, seed: int = 0, **ranks) -> MixedTrainBatches:
    return MixedTrainBatches(SIZES, shares, batch_size, seed, **ranks)


def epoch_of(batches: TrainBatches, epoch: int) -> list[list[int]]:
    batches.set_epoch(epoch)
    return [[index for _, index in batch] for batch in batches]


def part_of(index: int) -> str:
    return "image" if index < 100 else "clip" if index < 137 else "few"


def test_every_batch_is_of_one_part_and_the_shares_hold_in_every_epoch():
    batches = mixed()
    assert len(batches) == 25 + 9 + 2  # one walk through every part
    orders = set()
    for epoch in range(20):
        shown = epoch_of(batches, epoch)
        assert all(len({part_of(i) for i in batch}) == 1 and len(set(batch)) == 4 for batch in shown)
        parts = [part_of(batch[0]) for batch in shown]
        assert Counter(parts) == {"image": 18, "clip": 11, "few": 7}  # of 36: 18, 10.8 and 7.2
        orders.add(tuple(parts))
    assert len(orders) == 20


def test_a_small_part_is_walked_through_again_and_a_large_one_covered_over_the_epochs():
    batches = mixed()
    large: set[int] = set()
    for epoch in range(12):
        shown = [i for batch in epoch_of(batches, epoch) for i in batch]
        images, few = [i for i in shown if i < 100], [i for i in shown if i >= 137]
        assert len(set(images)) == len(images) == 72  # the beginning of a walk repeats nothing
        walks = [few[k : k + 8] for k in range(0, 28, 8)]  # two batches a walk, of 9 clips
        assert all(len(set(walk)) == len(walk) for walk in walks)
        assert walks[0] != walks[1] != walks[2]
        assert set(few) <= set(range(137, 146))
        large |= set(images)
    assert large == set(range(100))


def test_shares_by_size_show_every_full_batch_of_every_part_once():
    batches = MixedTrainBatches({"a": 40, "b": 20}, [2 / 3, 1 / 3], 4, seed=1)
    assert sorted(i for batch in epoch_of(batches, 0) for i in batch) == list(range(60))


def test_the_order_depends_on_seed_and_epoch_alone():
    assert epoch_of(mixed(), 3) == epoch_of(mixed(), 3)
    assert epoch_of(mixed(), 3) != epoch_of(mixed(), 4)
    assert epoch_of(mixed(), 3) != epoch_of(mixed(seed=1), 3)
    batches = mixed()
    epoch_of(batches, 1)
    assert epoch_of(batches, 0) == epoch_of(mixed(), 0)


def test_two_ranks_share_every_global_batch_and_seek_to_the_same_place():
    whole = epoch_of(mixed(batch_size=4), 2)
    ranks = [mixed(batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    for batches in ranks:
        batches.resume_at = (2, 11)
    first, second = (epoch_of(batches, 2) for batches in ranks)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole[11:]
    assert len(ranks[0]) == len(whole)
    assert [a + b for a, b in zip(*(epoch_of(batches, 3) for batches in ranks))] == epoch_of(mixed(), 3)


def test_last_batches_are_kept_where_asked_for():
    ranks = [mixed(batch_size=2, rank=rank, world_size=2, drop_last=False) for rank in range(2)]
    assert len(ranks[0]) == 25 + 10 + 3
    first, second = (epoch_of(batches, 0) for batches in ranks)
    assert [len(batch) for batch in first] == [len(batch) for batch in second]
    assert {1, 2} == {len(batch) for batch in first}
    assert all(part_of(a[0]) == part_of(b[0]) for a, b in zip(first, second))
    few = {i for batch in first + second for i in batch if i >= 137}
    assert few == set(range(137, 146))  # three batches a walk, and eight are shown
    tiny = MixedTrainBatches({"a": 2, "b": 50}, [0.5, 0.5], 8, seed=0, drop_last=False)
    assert {i for batch in epoch_of(tiny, 0) for i in batch if i < 2} == {0, 1}


@pytest.mark.parametrize(
    ("total", "shares", "counts"),
    [
        (10, [0.5, 0.5], [5, 5]),
        (10, [0.7, 0.2, 0.1], [7, 2, 1]),
        (11, [0.5, 0.5], [6, 5]),
        (10, [1 / 3] * 3, [4, 3, 3]),
        (5, [0.98, 0.01, 0.01], [5, 1, 1]),
        (36, [0.5, 0.3, 0.2], [18, 11, 7]),
    ],
)
def test_apportioning(total: int, shares: list[float], counts: list[int]):
    assert apportion(total, shares) == counts


def test_a_part_smaller_than_a_batch_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"Part 'few' .* has 9 clips, fewer than one batch of 10 .*5 on 2 ranks.*lower"
    ):
        mixed(batch_size=5, world_size=2)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_shows_every_item_once_and_never_mixes(world_size: int):
    ranks = [list(MixedEvaluationBatches([20, 5, 11], 4, rank, world_size)) for rank in range(world_size)]
    shown = [i for batches in ranks for batch in batches for i in batch]
    assert sorted(shown) == list(range(36))
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == len(MixedEvaluationBatches([20, 5, 11], 4, 0, world_size))

    def part(index: int) -> int:
        return (index >= 20) + (index >= 25)

    for step in zip(*ranks):  # all ranks show the same part
        assert len({part(i) for batch in step for i in batch}) == 1
        assert all(1 <= len(batch) <= 4 for batch in step)
    assert [part(batch[0]) for batch in ranks[0][:3]] == [0, 1, 2]


def test_a_batch_of_different_shapes_names_both_and_the_fix():
    image = {"video": torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "id": "one.jpg"}
    clip = {"video": torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "id": "two.mp4"}
    with pytest.raises(
        ValueError, match=r"\(1, 3, 8, 8\) of one\.jpg and \(4, 3, 8, 8\) of two\.mp4 .* parts of a Mixture"
    ):
        collate([image, image, clip])
    assert collate([clip, clip])["video"].shape == (2, 4, 3, 8, 8)


def test_a_dataset_whose_sample_knows_no_epoch_is_read_by_index():
    world = World("val", 2, num_frames=2, image_size=8, camera="rig4", supersample=1)
    assert at_epoch(world, 1, epoch=3)["video"].shape == (2, 3, 8, 8)  # sample() would give four views
