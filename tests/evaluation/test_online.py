"""Measures during training against their definitions, and a training that they do not change."""

from pathlib import Path

import pytest
import torch

from blueberry_video import train
from blueberry_video.config import compose
from blueberry_video.evaluation.online import OnlineEvaluation, knn_accuracy, rank_me, ridge_accuracy
from blueberry_video.experiment.checkpoint import latest_good_checkpoint
from blueberry_video.experiment.metrics_table import read_curves
from blueberry_video.experiment.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]


def clusters(seed: int, count: int = 60, dim: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Three overlapping clusters."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    centers = 1.5 * torch.eye(3, dim)
    return centers[labels] + torch.randn(count, dim, generator=generator), labels


def test_nearest_neighbors_vote_by_similarity():
    (train_x, train_y), (val_x, val_y) = clusters(0), clusters(1)
    correct = 0
    for x, y in zip(val_x, val_y):
        similarities = [float(torch.cosine_similarity(x, other, dim=0)) for other in train_x]
        nearest = sorted(range(60), key=lambda i: -similarities[i])[:5]
        votes = [
            sum(2.718281828459045 ** (similarities[i] / 0.07) for i in nearest if train_y[i] == c) for c in range(3)
        ]
        correct += votes.index(max(votes)) == int(y)
    assert knn_accuracy(train_x, train_y, val_x, val_y, k=5) == pytest.approx(correct / 60)
    assert knn_accuracy(train_x, train_y, train_x, train_y, k=1) == 1.0
    assert knn_accuracy(train_x, train_y, val_x, val_y, k=1000) <= 1.0


def test_linear_probe_is_ridge_regression():
    (train_x, train_y), (val_x, val_y) = clusters(0), clusters(1)
    x = (train_x - train_x.mean(0)) / train_x.std(0, correction=0)
    rows = torch.cat([x, (0.01 * 60) ** 0.5 * torch.eye(8)]).double()
    targets = torch.nn.functional.one_hot(train_y).double()
    padded = torch.cat([targets - targets.mean(0), torch.zeros(8, 3, dtype=torch.double)])
    weight = torch.linalg.lstsq(rows, padded).solution
    scores = ((val_x - train_x.mean(0)) / train_x.std(0, correction=0)).double() @ weight + targets.mean(0)
    expected = (scores.argmax(1) == val_y).double().mean()
    assert ridge_accuracy(train_x, train_y, val_x, val_y) == pytest.approx(float(expected))
    assert expected > 0.6  # chance level 0.33


def test_rank_me_counts_directions():
    assert rank_me(torch.eye(5)) == pytest.approx(5, rel=1e-4)
    assert rank_me(torch.ones(10, 4)) == pytest.approx(1, rel=1e-4)
    values = torch.tensor([3.0, 1.0])
    shares = values / 4
    expected = float((-(shares * shares.log()).sum()).exp())
    assert rank_me(torch.diag(values)) == pytest.approx(expected, rel=1e-4)


def run(folder: Path, *overrides: str) -> Path:
    quiet = ["logger=csv", "callbacks.progress=null", "callbacks.media=null", f"output_dir={folder}"]
    quick = ["data.train.size=32", "data.val.size=16", "data.batch_size=8", "trainer.max_steps=4"]
    config = compose(ROOT / "experiments" / "template" / "config.yaml", [*quiet, *quick, *overrides])
    train.run(config)
    torch.use_deterministic_algorithms(False)
    return RunFolder.open(folder / "template").path


def test_training_is_bit_identical_with_the_measures(tmp_path: Path):
    plain = run(tmp_path / "plain")
    measured = run(tmp_path / "online", "callbacks=online", "callbacks.online.every_n_steps=2")
    states = [
        torch.load(latest_good_checkpoint(each / "checkpoints"), weights_only=True)["state_dict"]
        for each in (plain, measured)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    curves = read_curves(measured / "metrics.csv")
    for label in ("motion", "shape"):
        for kind in ("knn", "linear"):
            assert len(curves[f"online/{label}_{kind}"]) == 2
            assert 0 <= curves[f"online/{label}_{kind}"][0][1] <= 1
            assert curves[f"online/{label}_{kind}_trivial"][0][1] > 0
    assert 1 <= curves["online/rank_me"][0][1] <= 16


def test_wrong_arguments_raise(tmp_path: Path):
    with pytest.raises(ValueError, match=r"callbacks\.online\.k=0"):
        OnlineEvaluation(k=0)
    with pytest.raises(ValueError, match=r"online\.labels.*'action'.*motion"):
        run(tmp_path, "callbacks=online", "callbacks.online.labels=[action]")
