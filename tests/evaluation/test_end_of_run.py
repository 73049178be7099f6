"""Evaluations at the end of a run: values, names, record, and what a resumed run repeats."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from blueberry_video.evaluation.end_of_run import RECORD, evaluate_at_end, evaluate_sets, measured_once, recorded


class Logger:
    def __init__(self):
        self.rows: list[tuple[int, dict]] = []

    def log_metrics(self, metrics, step):
        self.rows.append((step, metrics))


class FakeTrainer(SimpleNamespace):
    """Trainer with two loggers; validation and test log different metrics."""

    def validate(self, task, datamodule, verbose):
        self.calls.append(("validate", task, datamodule, verbose))
        self.callback_metrics = {"val/loss": torch.tensor(0.25), "val/motion": torch.tensor(0.5)}

    def test(self, task, datamodule, verbose):
        self.calls.append(("test", task, datamodule, verbose))
        self.callback_metrics = {"test/loss": torch.tensor(2.0)}


def trainer(folder, step: int = 40, rank: int = 0) -> FakeTrainer:
    parts = {"is_global_zero": rank == 0, "global_step": step, "default_root_dir": str(folder)}
    parts["lightning_module"] = torch.nn.Module()
    return FakeTrainer(**parts, loggers=[Logger(), Logger()], callback_metrics={}, callbacks=[], calls=[])


def test_values_are_logged_with_their_prefix_and_recorded(tmp_path):
    run = trainer(tmp_path)
    evaluate_at_end(run, "probe", lambda: {"motion": 0.75, "level": 0.5})
    expected = {"probe/motion": 0.75, "probe/level": 0.5}
    assert [logger.rows for logger in run.loggers] == [[(40, expected)]] * 2
    assert {name: value.item() for name, value in run.callback_metrics.items()} == expected
    assert all(isinstance(value, torch.Tensor) for value in run.callback_metrics.values())
    record = {"step": 40, "results": {"probe": {"motion": 0.75, "level": 0.5}}}
    assert json.loads((tmp_path / RECORD).read_text()) == record


def test_a_recorded_result_is_logged_again_and_not_measured(tmp_path):
    evaluate_at_end(trainer(tmp_path), "probe", lambda: {"motion": 0.75})
    run, calls = trainer(tmp_path), []
    evaluate_at_end(run, "probe", lambda: calls.append(1) or {"motion": 0.0})
    evaluate_at_end(run, "few", lambda: calls.append(2) or {"motion": 0.5})
    assert calls == [2]
    assert run.loggers[0].rows == [(40, {"probe/motion": 0.75}), (40, {"few/motion": 0.5})]
    assert recorded(run) == {"probe": {"motion": 0.75}, "few": {"motion": 0.5}}


def test_results_of_other_weights_are_ignored_and_replaced(tmp_path):
    evaluate_at_end(trainer(tmp_path, step=40), "probe", lambda: {"motion": 0.75})
    later = trainer(tmp_path, step=41)
    assert recorded(later) == {}
    assert measured_once(later, "few", lambda: {"motion": 0.5}) == {"motion": 0.5}
    assert json.loads((tmp_path / RECORD).read_text()) == {"step": 41, "results": {"few": {"motion": 0.5}}}


def test_only_rank_zero_writes_the_record(tmp_path):
    run = trainer(tmp_path, rank=1)
    assert measured_once(run, "probe", lambda: {"motion": 0.5}) == {"motion": 0.5}
    assert not (tmp_path / RECORD).exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 40}', '{"results": {}}', "7"])
def test_a_damaged_record_is_repeated_with_a_warning(tmp_path, content):
    (tmp_path / RECORD).write_text(content)
    with pytest.warns(UserWarning, match=RECORD):
        assert recorded(trainer(tmp_path)) == {}


@pytest.mark.parametrize("has_test", [True, False])
def test_the_test_set_is_evaluated_if_there_is_one(tmp_path, has_test):
    run, data = trainer(tmp_path), SimpleNamespace(test="clips" if has_test else None)
    metrics = evaluate_sets(run, "task", data)
    assert metrics == {"val/loss": 0.25, "val/motion": 0.5} | ({"test/loss": 2.0} if has_test else {})
    stages = ["validate", "test"] if has_test else ["validate"]
    assert run.calls == [(stage, "task", data, False) for stage in stages]
    assert list(recorded(run)) == [f"trainer.{stage}" for stage in stages]
    assert run.loggers[0].rows == []  # Lightning logs them


def test_a_resumed_run_evaluates_only_the_missing_sets(tmp_path):
    evaluate_sets(trainer(tmp_path), "task", SimpleNamespace(test=None))
    run = trainer(tmp_path)
    metrics = evaluate_sets(run, "task", SimpleNamespace(test="clips"))
    assert [call[0] for call in run.calls] == ["test"]
    assert metrics == {"val/loss": 0.25, "val/motion": 0.5, "test/loss": 2.0}
    assert run.loggers[1].rows == [(40, {"val/loss": 0.25, "val/motion": 0.5})]


def test_a_record_that_cannot_be_replaced_keeps_its_content(tmp_path, monkeypatch: pytest.MonkeyPatch):
    evaluate_at_end(trainer(tmp_path), "probe", lambda: {"motion": 0.75})
    before = (tmp_path / RECORD).read_text()

    def fail(path, target):
        raise OSError("no rename")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no rename"):
        measured_once(trainer(tmp_path), "few", lambda: {"motion": 0.5})
    assert (tmp_path / RECORD).read_text() == before
