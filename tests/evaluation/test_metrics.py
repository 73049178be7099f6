"""Accuracy, multi-view accuracy, class recall and frame shuffling."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blueberry_video.evaluation.metrics import (
    ViewScores,
    accuracy,
    mean_class_recall,
    recalled_by_class,
    shuffle_frames,
    within_pair_correct,
)
from gloo_group import gloo_group


def test_accuracy():
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


def test_within_pair_ignores_classes_outside_the_pair():
    logits = torch.tensor([[1.0, 0.0, 99.0], [1.0, 0.0, 99.0]])
    assert within_pair_correct(logits, torch.tensor([0, 1]), ((0, 1),)).tolist() == [True, False]
    assert accuracy(logits, torch.tensor([0, 1])).item() == 0


def test_without_clips_of_a_pair_the_result_is_empty():
    assert within_pair_correct(torch.randn(3, 4), torch.tensor([3, 3, 2]), ((0, 1),)).shape == (0,)


def test_a_model_that_ignores_frame_order_is_at_chance_level():
    """Equal logits for a clip and its reversal are correct for exactly one of the two."""
    logits = torch.randn(50, 4).repeat(2, 1)
    labels = torch.cat([torch.zeros(50), torch.ones(50)]).long()
    assert within_pair_correct(logits, labels, ((0, 1),)).float().mean().item() == 0.5


def test_shuffling_permutes_the_frames_of_each_clip_independently():
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


def test_shuffling_with_a_generator_does_not_change_the_global_one():
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


def views(videos: int = 7, per_video: int = 6, classes: int = 4) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Ids, logits and labels of all views, in a random order."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(videos * per_video, generator=generator).tolist()
    ids = [f"cooking/v{i // per_video}.mp4#{i % per_video // 3}.{i % 3}" for i in order]
    logits = 2 * torch.randn(len(order), classes, generator=generator)
    labels = torch.tensor([i // per_video % classes for i in order])
    return ids, logits, labels


def by_hand(ids: list[str], logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of videos with the largest mean softmax at the label, where each view counts once."""
    right = []
    for video in sorted({view.split("#")[0] for view in ids}):
        rows = {view: row for row, view in enumerate(ids) if view.startswith(f"{video}#")}.values()
        mean = sum(logits[row].softmax(dim=0) for row in rows) / len(rows)
        right.append(int(mean.argmax()) == labels[next(iter(rows))])
    return sum(right) / len(right)


def test_views_of_a_video_are_averaged():
    ids, logits, labels = views()
    scores = ViewScores()
    for rows in torch.arange(len(ids)).split(5):
        part = slice(rows[0], rows[-1] + 1)
        scores.add(
            ids[part],
            {"action": logits[part], "again": -logits[part]},
            dict.fromkeys(("action", "again"), labels[part]),
        )
    found = scores.accuracies()
    assert found["action"] == pytest.approx(by_hand(ids, logits, labels))
    assert found["again"] == pytest.approx(by_hand(ids, -logits, labels))
    assert 0 < found["action"] < 1
    assert scores.accuracies() == {}  # reset


def test_a_repeated_view_counts_once():
    logits = torch.tensor([[0.0, 1.0], [3.0, 0.0], [0.0, 2.0]])
    ids, labels = ["a#0.0", "a#0.1", "a#1.0"], torch.tensor([1, 1, 1])
    assert by_hand(ids, logits, labels) == 1
    scores = ViewScores()
    scores.add(ids, {"x": logits}, {"x": labels})
    scores.add(["a#0.1"] * 5, {"x": logits[1:2].expand(5, 2)}, {"x": labels[:1].expand(5)})
    assert scores.accuracies() == {"x": 1.0}


@pytest.mark.parametrize("clip", ["video.mp4", "no#view", "#0.1", "a#1.x"])
def test_clips_without_a_view_id_are_ignored(clip):
    scores = ViewScores()
    scores.add([clip], {"x": torch.randn(1, 2)}, {"x": torch.tensor([0])})
    assert scores.accuracies() == {}


def test_views_without_crop_numbers():
    scores = ViewScores()
    logits = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    scores.add(["a#0", "a#11"], {"x": logits}, {"x": torch.tensor([0, 0])})
    assert scores.accuracies() == {"x": 1.0}


def gathered(rank: int, folder: Path, results) -> None:
    """One of two processes: alternate views, the first one repeated as by a sampler that pads."""
    with gloo_group(folder, rank, 2):
        results.put(accuracies(rank))


def accuracies(rank: int) -> dict[str, float]:
    ids, logits, labels = views()
    rows = [*range(rank, len(ids), 2), *([0] if rank else [])]
    scores = ViewScores()
    scores.add([ids[row] for row in rows], {"action": logits[rows]}, {"action": labels[rows]})
    return scores.accuracies()


def test_views_of_all_processes_are_averaged_together(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=gathered, args=(rank, tmp_path, results), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    expected = pytest.approx(by_hand(*views()))
    assert [results.get()["action"] for _ in range(2)] == [expected, expected]


def test_mean_class_recall_weights_classes_equally_and_ignores_absent_ones():
    logits = torch.tensor([[3.0, 2, 1, 0], [3, 2, 1, 0], [3, 2, 1, 0], [0, 1, 2, 3]])
    labels = torch.tensor([0, 2, 0, 1])
    at_1, at_2, at_3 = (recalled_by_class(logits, labels, k) for k in (1, 2, 3))
    assert at_1.tolist() == [[2, 0, 0, 0], [2, 1, 1, 0]]
    assert at_2.tolist() == [[2, 0, 0, 0], [2, 1, 1, 0]]
    assert at_3.tolist() == [[2, 1, 1, 0], [2, 1, 1, 0]]
    assert [mean_class_recall(counts).item() for counts in (at_1, at_3)] == pytest.approx([1 / 3, 1])
    parts = [recalled_by_class(logits[rows], labels[rows], 1) for rows in (slice(0, 1), slice(1, 4))]
    assert torch.equal(sum(parts), at_1)
    assert recalled_by_class(logits, labels, 9)[0].tolist() == [2, 1, 1, 0]  # k exceeds the number of classes
    with pytest.raises(ValueError, match=r"(?s)0 to 4\b.*0 to 3\b.*model\.num_classes"):
        recalled_by_class(logits, torch.tensor([0, 4, 1, 1]))


def test_recall_among_valid_classes_only():
    """V-JEPA 2 sets the scores of all other classes to 0 before it takes the highest k."""
    torch.manual_seed(0)
    logits, valid = torch.randn(40, 6), [0, 2, 5]
    labels = torch.tensor(valid)[torch.randint(3, (40,))]
    scores = torch.zeros(40, 6)
    scores[:, valid] = logits.sigmoid()[:, valid]
    found = (scores.topk(2, dim=1).indices == labels[:, None]).any(dim=1)
    counts = recalled_by_class(logits, labels, 2, valid)
    assert counts[0].tolist() == [int((found & (labels == c)).sum()) for c in range(6)]
    assert counts[0].sum() > recalled_by_class(logits, labels, 2)[0].sum()
    with pytest.raises(ValueError, match=r"valid_classes=\[6\].*0 to 5"):
        recalled_by_class(logits, labels, 2, [6])
