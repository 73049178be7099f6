"""Checkpoint of the best validation: weights, test at the end, resume, early stopping, errors."""

import json
from pathlib import Path

import pytest
import torch

from blueberry_video.evaluate import evaluate
from blueberry_video.experiment.best import BEST, BestCheckpoint, best_checkpoint
from blueberry_video.experiment.metrics_table import read_curves
from blueberry_video.experiment.trained import load_trained
from trained_classifier import trained

TESTED = [
    "+data.test={_target_: blueberry_video.data.video_folder.VideoFolder, root: '${data.train.root}', split: val}"
]
TESTED += ["+data.test.num_frames=4", "+data.test.image_size=16"]
GETS_WORSE = ["optimizer.lr=0.01", "schedule=constant", "callbacks.best.mode=max"]  # the loss decreases


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its best validation at its begin, with a test on the validation clips."""
    best = ["trainer.max_steps=6", "callbacks.best.monitor=val/loss"]
    return trained(tmp_path_factory.mktemp("run"), *GETS_WORSE, *best, *TESTED)


def test_the_test_uses_the_best_weights(run: Path):
    curve = read_curves(run / "metrics.csv")["val/loss"]
    step, value = max(curve, key=lambda point: point[1])
    assert step < 5
    content = torch.load(run / "checkpoints" / BEST, weights_only=True)
    assert content["global_step"] == step + 1  # logged with the index of the last batch
    metrics = json.loads((run / "run.json").read_text())["metrics"]
    assert metrics["test/loss"] == pytest.approx(value)
    assert metrics["val/loss"] == pytest.approx(curve[-1][1])
    assert metrics["val/loss"] < metrics["test/loss"]
    record, _ = evaluate(run, out=run.parent / "best.json", best=True)
    assert record["metrics"]["val/loss"] == pytest.approx(value)
    assert record["checkpoint"] == BEST
    assert load_trained(run).checkpoint.name == "step_00000006.ckpt"


def test_a_run_without_a_best_checkpoint_raises(tmp_path: Path, run: Path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match=r"best\.ckpt.*callbacks\.best\.monitor"):
        best_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / BEST).write_bytes(b"cut off")
    with pytest.raises(FileNotFoundError, match=r"best\.ckpt.*damaged"):
        best_checkpoint(tmp_path)


def test_an_unknown_metric_raises(tmp_path: Path):
    with pytest.raises(ValueError, match=r"best\.monitor=val/nothing.*val/class"):
        trained(tmp_path, "callbacks.best.monitor=val/nothing")
    with pytest.raises(ValueError, match=r"best\.mode='up'"):
        BestCheckpoint("val/loss", "up")  # type: ignore[arg-type]


def test_training_ends_early(tmp_path: Path):
    stops = ["callbacks=early_stopping", "callbacks.early_stopping.patience=2", "callbacks.progress=null"]
    run = trained(tmp_path, *stops, *GETS_WORSE, "trainer.max_steps=40")
    record = json.loads((run / "run.json").read_text())
    assert "EarlyStopping" in record["ended_because"]
    assert record["step"] < 40
    curve = read_curves(run / "metrics.csv")["val/loss"]
    best = max(range(len(curve)), key=lambda index: curve[index][1])
    assert best_checkpoint(run).is_file()
    assert torch.load(best_checkpoint(run), weights_only=True)["global_step"] == curve[best][0] + 1


def test_the_best_value_is_resumed():
    callback = BestCheckpoint("val/loss")
    callback.load_state_dict({"monitor": "val/loss", "mode": "min", "value": 0.5, "step": 3})
    assert (callback.value, callback.step) == (0.5, 3)
    other = BestCheckpoint("val/class", "max")
    other.load_state_dict(callback.state_dict())
    assert other.value is None
