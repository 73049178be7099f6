"""Batch samplers of mixtures: one part per batch, the shares, resuming and ranks."""

from collections import Counter

import pytest
import torch

from blueberry_video.data.batches import (
    EvaluationBatches,
    MixedEvaluationBatches,
    MixedTrainBatches,
    TrainBatches,
    WeightedTrainBatches,
    apportion,
    collate,
)
from blueberry_video.data.clips import at_epoch
from blueberry_video.data.world import World

SIZES = {"image": 100, "clip": 37, "few": 9}


SHARES = {"image": 0.5, "clip": 0.3, "few": 0.2}


def mixed(batch_size: int = 4, seed: int = 0, **ranks) -> WeightedTrainBatches:
    return WeightedTrainBatches(SIZES, SHARES, batch_size, seed, **ranks)


def epoch_of(batches: TrainBatches, epoch: int) -> list[list[int]]:
    batches.set_epoch(epoch)
    return [[index for _, index in batch] for batch in batches]


def part_of(index: int) -> str:
    return "image" if index < 100 else "clip" if index < 137 else "few"


def test_batches_are_from_one_part_and_follow_the_shares():
    batches = mixed()
    assert len(batches) == 25 + 9 + 2  # one pass over every part
    orders = set()
    for epoch in range(20):
        shown = epoch_of(batches, epoch)
        assert all(len({part_of(i) for i in batch}) == 1 and len(set(batch)) == 4 for batch in shown)
        parts = [part_of(batch[0]) for batch in shown]
        assert Counter(parts) == {"image": 18, "clip": 11, "few": 7}  # of 36: 18, 10.8 and 7.2
        orders.add(tuple(parts))
    assert len(orders) == 20


def test_small_parts_repeat_and_large_parts_are_covered_over_epochs():
    batches = mixed()
    large: set[int] = set()
    for epoch in range(12):
        shown = [i for batch in epoch_of(batches, epoch) for i in batch]
        images, few = [i for i in shown if i < 100], [i for i in shown if i >= 137]
        assert len(set(images)) == len(images) == 72  # the beginning of a pass has no repetitions
        passes = [few[k : k + 8] for k in range(0, 28, 8)]  # two batches per pass over 9 clips
        assert all(len(set(clips)) == len(clips) for clips in passes)
        assert passes[0] != passes[1] != passes[2]
        assert set(few) <= set(range(137, 146))
        large |= set(images)
    assert large == set(range(100))


def test_shares_proportional_to_size_show_every_part_once():
    batches = WeightedTrainBatches({"a": 40, "b": 20}, {"a": 2 / 3, "b": 1 / 3}, 4, seed=1)
    assert sorted(i for batch in epoch_of(batches, 0) for i in batch) == list(range(60))


def test_order_depends_only_on_seed_and_epoch():
    assert epoch_of(mixed(), 3) == epoch_of(mixed(), 3)
    assert epoch_of(mixed(), 3) != epoch_of(mixed(), 4)
    assert epoch_of(mixed(), 3) != epoch_of(mixed(seed=1), 3)
    batches = mixed()
    epoch_of(batches, 1)
    assert epoch_of(batches, 0) == epoch_of(mixed(), 0)


def test_two_ranks_share_global_batches_and_resume_at_the_same_position():
    whole = epoch_of(mixed(batch_size=4), 2)
    ranks = [mixed(batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    for batches in ranks:
        batches.resume_at = (2, 11)
    first, second = (epoch_of(batches, 2) for batches in ranks)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole[11:]
    assert len(ranks[0]) == len(whole)
    assert [a + b for a, b in zip(*(epoch_of(batches, 3) for batches in ranks))] == epoch_of(mixed(), 3)


def test_drop_last_false_keeps_the_last_batches():
    ranks = [mixed(batch_size=2, rank=rank, world_size=2, drop_last=False) for rank in range(2)]
    assert len(ranks[0]) == 25 + 10 + 3
    first, second = (epoch_of(batches, 0) for batches in ranks)
    assert [len(batch) for batch in first] == [len(batch) for batch in second]
    assert {1, 2} == {len(batch) for batch in first}
    assert all(part_of(a[0]) == part_of(b[0]) for a, b in zip(first, second))
    few = {i for batch in first + second for i in batch if i >= 137}
    assert few == set(range(137, 146))  # three batches per pass, and eight are shown
    tiny = WeightedTrainBatches({"a": 2, "b": 50}, {"a": 0.5, "b": 0.5}, 8, seed=0, drop_last=False)
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
def test_apportion(total: int, shares: list[float], counts: list[int]):
    assert apportion(total, shares) == counts


def test_part_smaller_than_a_batch_raises():
    with pytest.raises(
        ValueError, match=r"'few'.*\b9\b.*\b10\b.*\b5\b.*\b2 ranks.*data\.batch_size.*data\.drop_last=false"
    ):
        mixed(batch_size=5, world_size=2)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_shows_every_item_once_in_batches_from_one_part(world_size: int):
    sizes = {"a": 20, "b": 5, "c": 11}
    batch_sizes = dict.fromkeys(sizes, 4)
    ranks = [list(MixedEvaluationBatches(sizes, batch_sizes, rank, world_size)) for rank in range(world_size)]
    shown = [i for batches in ranks for batch in batches for i in batch]
    assert sorted(shown) == list(range(36))
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == len(MixedEvaluationBatches(sizes, batch_sizes, 0, world_size))

    def part(index: int) -> int:
        return (index >= 20) + (index >= 25)

    for step in zip(*ranks):  # all ranks show the same part
        assert len({part(i) for batch in step for i in batch}) == 1
        assert all(1 <= len(batch) <= 4 for batch in step)
    assert [part(batch[0]) for batch in ranks[0][:3]] == [0, 1, 2]


def test_batch_of_different_shapes_raises():
    image = {"video": torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "id": "one.jpg"}
    clip = {"video": torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "id": "two.mp4"}
    with pytest.raises(ValueError, match=r"video.*\(1, 3, 8, 8\) of one\.jpg.*\(4, 3, 8, 8\) of two\.mp4.*Mixture"):
        collate([image, image, clip])
    assert collate([clip, clip])["video"].shape == (2, 4, 3, 8, 8)


def test_sample_without_an_epoch_argument_is_not_called():
    world = World("val", 2, num_frames=2, image_size=8, camera="rig4", supersample=1)
    assert at_epoch(world, 1, epoch=3)["video"].shape == (2, 3, 8, 8)  # sample() would return four views


def test_a_single_process_is_the_default():
    assert list(EvaluationBatches(5, 2)) == [[0, 1], [2, 3], [4]]
    assert list(MixedEvaluationBatches({"a": 2, "b": 3}, {"a": 2, "b": 2})) == [[0, 1], [2, 3], [4]]
    assert sorted(index for batch in TrainBatches(6, 2, seed=0) for _, index in batch) == list(range(6))


def test_clips_per_batch_is_the_mean_over_the_batches_of_an_epoch():
    assert TrainBatches(10, 3, seed=0, world_size=2).clips_per_batch == 6
    assert TrainBatches(10, 3, seed=0, world_size=2, drop_last=False).clips_per_batch == 5
    mixed = MixedTrainBatches({"a": 8, "b": 2}, {"a": 2, "b": 1}, seed=0)  # 4 batches of 2 clips and 2 of 1
    assert mixed.clips_per_batch == pytest.approx(10 / 6)
