"""Means and class counts over unequal batches, and over two processes with different items and classes."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist

from blueberry_video.evaluation.metrics import ClassCounts, Means

BATCHES = [[3, 0, 3], [1], [3, 1, 1, 3, 3], [0, 0]]  # 11 items, the largest class first, later and never


def of_batches(batches: list[list[int]]) -> dict[str, float]:
    means, counts = Means(), ClassCounts()
    for batch in batches:
        labels = torch.tensor(batch)
        means.add("mean", labels.float().mean(), len(batch))
        means.add("vector", labels.float(), 99)  # one value per item: the count is ignored
        means.add("half", labels.bfloat16().mean() + 256, len(batch))
        counts.add({"a": labels, "b": 3 - labels})
    found = {**means.compute(), **counts.majority_shares()}
    return {name: value.item() for name, value in found.items()}


EXPECTED = {"mean": 18 / 11, "vector": 18 / 11, "a": 5 / 11, "b": 5 / 11}


def test_means_weight_items_equally_and_shares_are_those_of_the_largest_class():
    found = of_batches(BATCHES)
    assert found.pop("half") == pytest.approx(256 + 18 / 11, abs=1.0)
    assert found == pytest.approx(EXPECTED)
    assert of_batches(BATCHES[::-1])["a"] == pytest.approx(5 / 11)
    assert of_batches([[2, 2, 2, 0]]) == pytest.approx(
        {"mean": 1.5, "vector": 1.5, "half": 257.5, "a": 0.75, "b": 0.75}, abs=0.6
    )


def test_means_and_counts_are_reset_and_names_are_separate():
    means, counts = Means(), ClassCounts()
    assert means.compute() == counts.majority_shares() == {}
    means.add("x", torch.tensor(4.0, requires_grad=True), 3)
    means.add("y", torch.tensor([1.0, 2.0, 6.0]), 3)
    counts.add({"shape": torch.tensor([1, 1, 0])})
    first = means.compute()
    assert {name: value.item() for name, value in first.items()} == {"x": 4, "y": 3}
    assert not first["x"].requires_grad
    assert counts.majority_shares()["shape"].item() == pytest.approx(2 / 3)
    assert means.compute() == counts.majority_shares() == {}
    means.add("x", torch.tensor(2.0), 1)
    counts.add({"shape": torch.tensor([0])})
    assert means.compute()["x"].item() == 2
    assert counts.majority_shares()["shape"].item() == 1


def test_a_name_without_items_is_left_out():
    means = Means()
    means.add("none", torch.zeros(0), 5)
    means.add("some", torch.zeros(0), 5)
    means.add("some", torch.tensor([2.0, 4.0]), 2)
    assert {name: value.item() for name, value in means.compute().items()} == {"some": 3}


def test_a_mean_of_nan_is_nan():
    means = Means()
    means.add("x", torch.tensor(torch.nan), 1)
    means.add("x", torch.tensor(1.0), 9)
    assert means.compute()["x"].isnan()


def test_sums_of_16_bit_values_have_32_bits():
    """2,000 values of 1: a sum in bfloat16 stops at 256."""
    means = Means()
    for _ in range(20):
        means.add("x", torch.ones(100, dtype=torch.bfloat16), 100)
        means.add("y", torch.tensor(1.0, dtype=torch.float64), 1)
    values = means.compute()
    assert values["x"].item() == 1
    assert values["y"].item() == 1


def gathered(rank: int, rendezvous: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    results.put(of_batches([BATCHES[:3], BATCHES[3:]][rank]))  # 9 items up to class 3, 2 items of class 0
    dist.barrier()
    dist.destroy_process_group()


def test_means_and_shares_of_two_processes_are_those_of_all_items(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    arguments = [(rank, str(tmp_path / "meet"), results) for rank in range(2)]
    processes = [context.Process(target=gathered, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    for found in (results.get(), results.get()):
        assert {name: found[name] for name in EXPECTED} == pytest.approx(EXPECTED)
