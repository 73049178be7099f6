"""Keys of the config reach data, model, task and trainer, and a run calls its parts in order, in ranks as well."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from blueberry_video import train
from blueberry_video.config import compose
from blueberry_video.experiment import report, summary
from blueberry_video.experiment.loggers import MetricsCSV
from blueberry_video.experiment.run_folder import RunFolder
from blueberry_video.launch import memory, processes

TEMPLATE = Path(__file__).resolve().parents[1] / "experiments" / "template" / "config.yaml"
TINY = ["data.train.size=16", "data.val.size=8", "data.batch_size=4", "model.encoder.depth=1", "logger=csv"]


def composed(tmp_path: Path, *overrides: str):
    return compose(TEMPLATE, [*TINY, f"output_dir={tmp_path}", *overrides])


def built(tmp_path: Path, *overrides: str) -> tuple[Any, Any, Any, Any, RunFolder]:
    config = composed(tmp_path, *overrides)
    folder = RunFolder.create(config, tmp_path)
    return *train.build(config, folder), folder


def test_settings_reach_data_model_task_and_trainer(tmp_path: Path):
    overrides = ["seed=7", "data.num_workers=3", "optimizer.lr=0.0123", "optimizer.weight_decay=0.045"]
    overrides += ["trainer.max_steps=77", "trainer.log_every_n_steps=6", "callbacks.checkpoints.every_n_steps=5"]
    overrides += ["callbacks.checkpoints.keep=4", "callbacks.media=null", "schedule.warmup=13"]
    data, model, task, trainer, folder = built(tmp_path, *overrides)
    assert (data.batch_size, data.num_workers, len(data.train), len(data.val)) == (4, 3, 16, 8)
    assert task.model is model
    assert (trainer.max_steps, trainer.log_every_n_steps) == (77, 6)
    assert trainer.default_root_dir == folder.path or trainer.default_root_dir == str(folder.path)
    checkpoints = next(callback for callback in trainer.callbacks if type(callback).__name__ == "Checkpoints")
    assert (checkpoints.every_n_steps, checkpoints.keep) == (5, 4)
    assert "Media" not in [type(callback).__name__ for callback in trainer.callbacks]
    assert [type(logger) for logger in trainer.loggers] == [MetricsCSV]
    assert trainer.logger.save_dir == str(folder.path)
    optimizer = task.optimization.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.0123, 0.045)
    assert task.optimization.schedule.keywords["warmup"] == 13
    assert task.optimization.init_from is None


def test_seed_sets_all_generators_before_the_weights(tmp_path: Path):
    def weights_and_numbers(seed: int) -> tuple:
        torch.manual_seed(99)
        _, model, *_ = built(tmp_path, f"seed={seed}")
        weights = torch.cat([parameter.flatten() for parameter in model.parameters()])
        return weights, torch.rand(1).item(), np.random.rand(), random.random()

    first, again, other = weights_and_numbers(3), weights_and_numbers(3), weights_and_numbers(4)
    assert torch.equal(first[0], again[0])
    assert first[1:] == again[1:]
    assert not torch.equal(first[0], other[0])
    assert all(one != two for one, two in zip(first[1:], other[1:], strict=True))


@pytest.mark.parametrize(("interval", "accumulated", "batches"), [(3, 4, 12), (3, 1, 3), (0.5, 4, 0.5)])
def test_validation_interval_is_in_optimizer_steps(tmp_path: Path, interval: float, accumulated: int, batches: float):
    overrides = [f"trainer.val_check_interval={interval}", f"trainer.accumulate_grad_batches={accumulated}"]
    trainer = built(tmp_path, *overrides)[3]
    assert (trainer.val_check_interval, trainer.accumulate_grad_batches) == (batches, accumulated)


def test_weights_are_read_unless_training_continues_from_a_checkpoint(tmp_path: Path, monkeypatch):
    weights = tmp_path / "weights.ckpt"
    weights.write_bytes(b"x")
    config = composed(tmp_path, f"init_from={weights}")
    folder = RunFolder.create(config, tmp_path)
    assert train.build(config, folder)[2].optimization.init_from == weights
    monkeypatch.setattr(folder, "checkpoint", lambda: tmp_path / "step_00000001.ckpt")
    assert train.build(config, folder)[2].optimization.init_from is None


def test_logger_receives_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Logger(DummyLogger):
        def __init__(self, run: RunFolder, **options: Any) -> None:
            super().__init__()
            self.run, self.options = run, options

    monkeypatch.setattr("blueberry_video.experiment.loggers.Wandb", Logger)
    *_, trainer, folder = built(tmp_path, "logger=wandb", "logger.mode=offline", "logger.project=p")
    csv, logger = trainer.loggers
    assert (type(csv), logger.run) == (MetricsCSV, folder)
    assert (logger.options["mode"], logger.options["project"]) == ("offline", "p")


def test_unreadable_videos_are_listed_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from blueberry_video.data.datamodule import DataModule

    listed = []
    monkeypatch.setattr(DataModule, "list_skipped_in", lambda self, file: listed.append(file))
    *_, folder = built(tmp_path)
    assert listed == [str(folder.path / "skipped.csv")]


# ---- order of a run --------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns the calls of the parts of a run, which do nothing but record the metrics of a run."""
    found: list[Any] = []

    def fit(config: Any, folder: RunFolder) -> None:
        found.append(("fit", folder.record["status"]))
        if not processes.shared_folder():
            folder.finish({"val/loss": 0.25, "val/motion": 0.5})

    def start(config: Any, run: Path, number: int) -> None:
        found.append(("start", number, run.is_dir()))
        RunFolder(run).finish({"val/loss": 0.75})

    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(processes, "start", start)
    monkeypatch.setattr(memory, "announce", lambda config: found.append("memory"))
    monkeypatch.setattr(report, "write_report", lambda folder: found.append(("report", folder.record["status"])))
    monkeypatch.setattr(summary, "summary", lambda folder: f"summary of {folder.record['metrics']}")
    return found


@pytest.mark.parametrize(("metric", "value"), [("val/loss", 0.25), ("val/motion", 0.5), ("null", None)])
def test_run_ends_before_its_report(tmp_path: Path, calls: list, metric: str, value: float | None, capsys):
    created = []
    config = composed(tmp_path, f"optimized_metric={metric}")
    assert train.run(config, created=created.append) == value
    assert calls == ["memory", ("fit", "running"), ("report", "finished")]
    [folder] = created
    assert folder.parent == tmp_path / "template"
    assert capsys.readouterr().out.count("summary of {'val/loss': 0.25, 'val/motion': 0.5}") == 1


def test_report_that_cannot_be_written_does_not_hide_the_results(tmp_path: Path, calls: list, monkeypatch, capsys):
    def full(folder: RunFolder) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(report, "write_report", full)
    with pytest.warns(UserWarning, match=r"report\.html .*No space left.*`make report EXP="):
        assert train.run(composed(tmp_path)) == 0.25
    assert "summary of {'val/loss': 0.25, 'val/motion': 0.5}" in capsys.readouterr().out


@pytest.mark.parametrize("devices", ["3", "[0,1,5]"])
def test_run_of_several_devices_starts_as_many_processes(tmp_path: Path, calls: list, devices: str):
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={devices}", "trainer.precision=32-true"]
    assert train.run(composed(tmp_path, *ddp)) == 0.75
    assert calls == ["memory", ("start", 3, True), ("report", "finished")]


def test_rank_trains_in_the_folder_of_its_parent_and_writes_no_report(tmp_path: Path, calls: list, monkeypatch, capsys):
    config = composed(tmp_path, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=3")
    folder = RunFolder.create(config, tmp_path)
    folder._lock.release()
    monkeypatch.setenv(processes.FOLDER_VARIABLE, str(folder.path))
    locked = []
    monkeypatch.setattr(RunFolder, "lock", lambda self, rank=False: locked.append(rank))
    runs = []
    fit = train.fit
    monkeypatch.setattr(train, "fit", lambda config, run: (runs.append(run), fit(config, run)))
    train.train_rank({"config": config, "folder": str(folder.path), "resumed": False})
    assert calls == [("fit", "running")]
    assert ([run.path for run in runs], locked) == ([folder.path], [True])
    assert runs[0].resumed is False
    assert folder.record["status"] == "running", "its parent records the end"
    assert "summary" not in capsys.readouterr().out


@pytest.mark.parametrize(("limit", "passes"), [(0.3, True), (0.2, False)])
def test_missed_value_fails_only_with_enforce_expected(tmp_path: Path, calls: list, limit: float, passes: bool):
    expected = f"+expected.val/loss.at_most={limit}"
    train.run(composed(tmp_path, expected))
    if passes:
        train.run(composed(tmp_path, expected, "enforce_expected=true"))
    else:
        with pytest.raises(SystemExit, match=r"MISSED  val/loss = 0\.25"):
            train.run(composed(tmp_path, expected, "enforce_expected=true"))
    assert calls[3:] == ["memory", ("fit", "running"), ("report", "finished")], "the report is written before"


def test_dry_run_creates_no_folder(tmp_path: Path, calls: list, monkeypatch: pytest.MonkeyPatch):
    tried = []
    monkeypatch.setattr(train.dry_run, "dry_run", lambda *arguments: tried.append(arguments))
    config = composed(tmp_path, "check=true")
    assert train.run(config) is None
    assert tried == [(config, RunFolder.create, train.build, None)]
    assert (calls, list(tmp_path.iterdir())) == ([], [])


def test_failure_is_recorded_and_there_is_no_report(tmp_path: Path, calls: list, monkeypatch: pytest.MonkeyPatch):
    created = []

    def fail(config: Any, folder: RunFolder) -> None:
        raise ArithmeticError("odd")

    monkeypatch.setattr(train, "fit", fail)
    with pytest.raises(ArithmeticError, match="odd"):
        train.run(composed(tmp_path), created=created.append)
    assert calls == ["memory"]
    record = RunFolder.open(created[0]).record
    assert (record["status"], record["error"]) == ("failed", "ArithmeticError: odd")
