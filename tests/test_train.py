"""Training entry point in this process: train, repeat, resume, init_from, sweep."""

import csv
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch

from blueberry_video import train
from blueberry_video.callbacks import Throughput
from blueberry_video.data.write import write_video
from blueberry_video.evaluation.end_of_run import evaluate_at_end
from blueberry_video.tasks.classification import Classification

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "logger=csv",
    "~callbacks.progress",
    "~callbacks.media",
    "data.train.size=16",
    "data.val.size=4",
    "data.batch_size=4",
    "model.encoder.depth=1",
    "trainer.log_every_n_steps=1",
    "callbacks.checkpoints.every_n_steps=2",
]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Returns a function that calls ``train.main`` and returns the folders of all runs, oldest first."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> list[Path]:
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        train.main()
        return sorted(file.parent for file in (tmp_path / "outputs" / "template").glob("*/run.json"))

    return call


EXPERIMENT = ["--config-dir", str(ROOT / "experiments" / "template"), *TINY]


def losses(run: Path) -> list[str]:
    return [row["train/loss"] for row in csv.DictReader((run / "metrics.csv").open()) if row["train/loss"]]


def record(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def test_run_can_be_repeated_and_continued(command, capsys: pytest.CaptureFixture):
    [first] = command(*EXPERIMENT, "trainer.max_steps=4")
    assert record(first)["status"] == "finished"
    assert "val/loss" in capsys.readouterr().out
    assert (first / "report.html").is_file()

    runs = command(str(first / "config.yaml"))
    assert len(runs) == 2
    assert losses(runs[1]) == losses(first), "training on a run's config repeats it"

    assert command(*EXPERIMENT, f"resume={first.name}", "trainer.max_steps=6") == runs, "the same folder"
    assert "from step_00000004.ckpt (step 4 of 6)" in capsys.readouterr().out
    assert len(losses(first)) == 6
    assert losses(first)[:4] == losses(runs[1])
    assert record(first)["resumes"][0]["previous_status"] == "finished"


def test_results_of_a_finished_run_are_not_replaced(command, capsys: pytest.CaptureFixture):
    [run] = command(*EXPERIMENT, "trainer.max_steps=2")
    before = record(run), (run / "metrics.csv").read_text()
    for override in ("data.val.size=8", "optimizer.lr=0.5", "expected={val/loss: {at_most: 9}}"):
        key = override.partition("=")[0]
        others = [word for word in EXPERIMENT if not word.startswith(f"{key}=")]
        with pytest.raises(ValueError, match=rf"resume={run.name}: .*{key}.*trainer\.max_steps.*init_from="):
            command(*others, "trainer.max_steps=2", override, "resume=last")
        assert (record(run), (run / "metrics.csv").read_text()) == before
    command(*EXPERIMENT, "trainer.max_steps=2", "resume=last")
    assert re.search(r"finished at step 2\b", capsys.readouterr().out)
    assert (record(run), (run / "metrics.csv").read_text()) == before


def test_overrides_of_a_resumed_run_take_effect_and_are_recorded(command, capsys: pytest.CaptureFixture):
    [run] = command(*EXPERIMENT, "trainer.max_steps=4", "schedule=constant", "schedule.warmup=0", "optimizer.lr=0.01")
    wanted = ["optimizer.lr=0.002", "optimizer.weight_decay=.5", "trainer.precision=bf16-mixed", "trainer.max_steps=8"]
    wanted += ["schedule=warmup_linear", "schedule.warmup=0", "optimizer.betas=[.8,.9]"]
    command(*EXPERIMENT, *wanted, "resume=last")
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    rates = [float(row["train/lr"]) for row in rows if row["train/lr"]]
    linear = [0.002 * (1 - step / 7) for step in range(8)]
    assert rates == pytest.approx([0.01] * 4 + linear[4:], rel=1e-6)
    changed = {entry["key"]: entry for entry in record(run)["resumes"][0]["changed"]}
    entry = changed["optimizer.lr"]
    assert (entry["old"], entry["new"], entry["step"]) == (0.01, 0.002, 4)
    assert (changed["trainer.precision"]["new"], changed["optimizer.weight_decay"]["old"]) == ("bf16-mixed", 0.05)
    assert "optimizer.lr: 0.01 -> 0.002" in capsys.readouterr().out
    saved = torch.load(run / "checkpoints" / "step_00000008.ckpt", weights_only=True)
    assert [group["weight_decay"] for group in saved["optimizer_states"][0]["param_groups"]] == [0.5, 0.0]
    assert [tuple(group["betas"]) for group in saved["optimizer_states"][0]["param_groups"]] == [(0.8, 0.9)] * 2
    assert saved["lr_schedulers"][0]["base_lrs"] == [0.002, 0.002]

    # The values stay those of the run, also without the overrides.
    command(*EXPERIMENT, "trainer.max_steps=10", "resume=last")
    assert [entry["key"] for entry in record(run)["resumes"][1]["changed"]] == ["trainer.max_steps"]
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    rates = [float(row["train/lr"]) for row in rows if row["train/lr"]]
    assert rates[8:] == pytest.approx([0.002 * (1 - step / 9) for step in (8, 9)], abs=1e-9)


def test_refused_override_changes_nothing(command):
    [run] = command(*EXPERIMENT, "trainer.max_steps=2")
    before = record(run)
    with pytest.raises(ValueError, match=rf"`seed` = 1 .*seed = 0.*init_from={run}"):
        command(*EXPERIMENT, "trainer.max_steps=4", "seed=1", "resume=last")
    assert record(run) == before


def test_accumulation_changes_only_where_a_step_begins(command):
    [run] = command(*EXPERIMENT, "trainer.max_steps=3")
    before = record(run)
    with pytest.raises(ValueError, match=r"accumulate_grad_batches=2 .*step_00000003\.ckpt.*3 batches.*\(1, 3\)"):
        command(*EXPERIMENT, "trainer.max_steps=5", "trainer.accumulate_grad_batches=2", "resume=last")
    assert record(run) == before
    command(*EXPERIMENT, "trainer.max_steps=4", "resume=last")
    command(*EXPERIMENT, "trainer.max_steps=6", "trainer.accumulate_grad_batches=2", "resume=last")
    assert record(run)["resumes"][1]["changed"][-1]["new"] == 2
    saved = torch.load(run / "checkpoints" / "step_00000006.ckpt", weights_only=True)
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == 4 + 2 * 2


@pytest.mark.parametrize(
    ("number", "step", "options"),
    [
        (signal.SIGTERM, 3, []),
        (signal.SIGINT, 3, []),
        (signal.SIGUSR1, 3, []),
        (signal.SIGTERM, 4, []),  # with a validation at the end of an epoch
        (signal.SIGTERM, 3, ["trainer.accumulate_grad_batches=2"]),
        (signal.SIGTERM, 6, []),  # the last one: the evaluations at the end remain
    ],
    ids=["batch", "ctrl-c", "warning", "validation", "accumulation", "end"],
)
def test_signal_while_training_saves_a_checkpoint(
    command, monkeypatch, capsys, number: signal.Signals, step: int, options: list[str]
):
    options = [*EXPERIMENT, *options, "callbacks.checkpoints.every_n_steps=100", "trainer.max_steps=6"]
    [whole] = command(*options)

    def stop(self: Throughput, trainer: lightning.Trainer, *arguments: object) -> None:
        if trainer.global_step == step - 1 and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    sent: list[signal.Signals] = []
    monkeypatch.setattr(Throughput, "on_train_batch_start", stop)
    with pytest.raises(SystemExit) as ended:
        command(*options)
    assert ended.value.code == (143 if number == signal.SIGUSR1 else 128 + number)
    assert f"Stopped by {number.name}." in capsys.readouterr().err
    run = sorted((whole.parent).glob("*/run.json"))[-1].parent
    assert record(run)["status"] == "interrupted"
    assert [file.name for file in (run / "checkpoints").glob("*.ckpt")] == [f"step_{step:08d}.ckpt"]
    command(*options, "resume=last")
    weights = [
        torch.load(folder / "checkpoints" / "step_00000006.ckpt", weights_only=True)["state_dict"]
        for folder in (whole, run)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert losses(run) == losses(whole)
    assert record(run)["metrics"]["val/loss"] == record(whole)["metrics"]["val/loss"]


def test_second_signal_ends_at_once(command, monkeypatch):
    def stop(self: Throughput, trainer: lightning.Trainer, *arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        assert not reached
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(True)

    reached: list[bool] = []
    monkeypatch.setattr(Throughput, "on_train_batch_start", stop)
    with pytest.raises(SystemExit) as ended:
        command(*EXPERIMENT, "trainer.max_steps=4")
    assert (ended.value.code, reached) == (130, [])


def test_signal_ends_a_batch_that_does_not_end(command, monkeypatch):
    def hang(self: Throughput, trainer: lightning.Trainer, *arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(train.signals, "SAVE_SECONDS", 1.0)
    monkeypatch.setattr(Throughput, "on_train_batch_start", hang)
    began = time.perf_counter()
    with pytest.raises(SystemExit) as ended:
        command(*EXPERIMENT, "trainer.max_steps=4")
    assert ended.value.code == 143
    assert time.perf_counter() - began < 40


def test_run_killed_in_its_evaluations_measures_only_what_is_missing(command, monkeypatch):
    [whole] = command(*EXPERIMENT, "trainer.max_steps=2")

    def measured(self: Throughput, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        evaluate_at_end(trainer, "probe", lambda: calls.append(trainer.global_step) or {"motion": 0.5})
        if len(calls) == 1 and not trainer.ckpt_path:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    calls: list[int] = []
    monkeypatch.setattr(Throughput, "on_train_end", measured, raising=False)
    began = time.perf_counter()
    with pytest.raises(SystemExit) as ended:
        command(*EXPERIMENT, "trainer.max_steps=2")
    assert ended.value.code == 143
    assert time.perf_counter() - began < 50
    run = command(*EXPERIMENT, "trainer.max_steps=2", "resume=last")[-1]
    assert calls == [2]
    assert record(run)["status"] == "finished"
    assert record(run)["metrics"]["probe/motion"] == 0.5
    assert losses(run) == losses(whole)
    got, wanted = record(run)["metrics"], record(whole)["metrics"]
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert got[name] == wanted[name]


@pytest.mark.parametrize("content", [b"", b'{"step": 2, "resu', bytes(64), b"[]", b'{"step": 2, "results": 3}'])
def test_damaged_results_of_the_evaluations_are_measured_again(command, content: bytes):
    [run] = command(*EXPERIMENT, "trainer.max_steps=2")
    before = record(run)["metrics"]
    (run / "end_of_run.json").write_bytes(content)
    (run / "run.json").write_text(json.dumps({**record(run), "status": "running"}))
    with pytest.warns(UserWarning, match=r"end_of_run\.json is damaged"):
        command(*EXPERIMENT, "trainer.max_steps=2", "resume=last")
    assert record(run)["metrics"]["val/loss"] == before["val/loss"]
    assert json.loads((run / "end_of_run.json").read_text())["step"] == 2


def test_init_from_loads_the_encoder_of_a_run(command, capsys: pytest.CaptureFixture):
    [first] = command(*EXPERIMENT, "trainer.max_steps=2")
    checkpoint = next((first / "checkpoints").glob("*.ckpt"))
    classify = ["model=classifier/tiny", "task=classification", f"init_from='{checkpoint}'", "trainer.max_steps=1"]
    command(*EXPERIMENT, *classify)
    assert f"encoder tensors from {checkpoint}" in capsys.readouterr().out

    killed = command(*EXPERIMENT, *classify)[-1]
    shutil.rmtree(killed / "checkpoints")
    (killed / "run.json").write_text(json.dumps({**record(killed), "status": "running"}))
    capsys.readouterr()
    command(*EXPERIMENT, *classify, "resume=last")
    output = capsys.readouterr().out
    assert f"{killed.name}: no checkpoint" in output
    assert f"encoder tensors from {checkpoint}" in output


def test_every_job_of_a_sweep_has_its_own_folder(command):
    runs = command(*EXPERIMENT, "--multirun", "trainer.max_steps=1", "seed=1,2")
    assert [record(run)["seed"] for run in runs] == [1, 2]
    assert losses(runs[0]) != losses(runs[1])


def test_sweep_with_failing_points_ends_with_one_table(command, tmp_path: Path, capsys: pytest.CaptureFixture):
    expected = "expected={val/loss: {at_most: 100}}"
    fails = "data.train.size=8,-4"  # the dataset refuses the second
    with pytest.raises(SystemExit) as ended:
        command(*EXPERIMENT, "--multirun", "trainer.max_steps=1", "seed=1,2", fails, expected, "enforce_expected=true")
    assert ended.value.code == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    assert "HYDRA_FULL_ERROR" not in captured.err
    lines = captured.out[re.search(r"^point +state", captured.out, re.MULTILINE).start() :].splitlines()
    assert lines[0].split() == ["point", "state", "val/loss", "error"]
    runs = sorted((tmp_path / "outputs" / "template").glob("*/run.json"))
    good = {f"{record(run.parent)['metrics']['val/loss']:.4g}" for run in runs if record(run.parent)["metrics"]}
    rows = [line.split(maxsplit=4) for line in lines[1:5]]
    assert {tuple(row[:3]) for row in rows} == {
        (f"seed={seed}", f"data.train.size={size}", state)
        for size, state in ((8, "finished"), (-4, "failed"))
        for seed in (1, 2)
    }
    assert {row[3] for row in rows if row[2] == "finished"} == good
    assert all("-4" in row[4] for row in rows if row[2] == "failed")
    assert lines[5].startswith("2 of 4 points finished")


def test_unknown_optimized_metric_raises_after_a_complete_run(command, tmp_path: Path):
    with pytest.raises(ValueError, match=r"optimized_metric=val/los .*`val/loss`"):
        command(*EXPERIMENT, "trainer.max_steps=1", "optimized_metric=val/los")
    [file] = tmp_path.rglob("run.json")
    assert record(file.parent)["status"] == "finished"
    assert (file.parent / "report.html").is_file()


def write_videos(folder: Path) -> None:
    """Writes four videos per split, 24 frames of 32 x 64; the class is the parity of the index."""
    (folder / "videos").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 64, 3), np.uint8)
    rows = []
    for split in ("train", "val"):
        for number in range(4):
            name = f"videos/{split}_{number}.mp4"
            write_video(folder / name, np.roll(noise, 8 * number, axis=2), fps=8)
            rows.append({"file_name": name, "split": split, "labels": {"action": f"class {number % 2}"}})
    (folder / "metadata.json").write_text(json.dumps(rows))


def test_test_set_is_evaluated_once_at_the_end_as_mean_over_views(command, tmp_path: Path, monkeypatch):
    """Uses the test set of the published fine-tuning with small videos and a small model."""
    write_videos(tmp_path / "videos")
    tested: list[tuple[str, torch.Tensor]] = []
    scores: list[torch.Tensor] = []
    step = Classification.test_step

    def spy(self: Classification, batch: dict, batch_idx: int) -> None:
        tested.extend(zip(batch["id"], batch["labels"]["action"], strict=True))
        scores.append(self.model(self.normalize(batch["video"]))["action"].softmax(dim=1))
        step(self, batch, batch_idx)

    monkeypatch.setattr(Classification, "test_step", spy)
    experiment = ["--config-dir", str(ROOT / "experiments" / "videomae_finetune_k400"), *TINY[:3], "name=template"]
    small = ["model=classifier/tiny", "model.num_classes={action: 2}", "model.encoder.depth=1", "trainer=cpu"]
    data = [f"data.train.root={tmp_path / 'videos'}", "data.train.image_size=40", "data.num_workers=0"]
    limits = ["data.batch_size=4", "trainer.max_epochs=1", "trainer.precision=32-true"]
    [run] = command(*experiment, *small, *data, "data.train.stride=1", *limits)
    views = [f"val_{number}.mp4#{clip}.{crop}" for number in range(4) for clip in range(5) for crop in range(3)]
    assert [name for name, _ in tested] == views
    means = torch.cat(scores).view(4, 15, 2).mean(dim=1)
    truth = torch.stack([label for _, label in tested])[::15]
    metrics = record(run)["metrics"]
    assert metrics["test/action_views"] == pytest.approx((means.argmax(dim=1) == truth).float().mean().item())
    assert {"train/loss", "val/loss", "test/loss", "test/action"} <= metrics.keys()
    assert metrics["val/action_views"] == metrics["val/action"], "one view of each video"
    assert "test/action_views" in (run / "metrics.csv").read_text().splitlines()[0]


def test_no_test_metrics_without_a_test_set(command):
    [run] = command(*EXPERIMENT, "trainer.max_steps=1")
    assert not [name for name in record(run)["metrics"] if name.startswith("test/")]


def test_missed_expected_value_fails_with_enforce_expected(command, capsys: pytest.CaptureFixture):
    expected = "expected={val/loss: {at_most: 0.000001}}"
    impossible = [*EXPERIMENT, "trainer.max_steps=1", expected]
    command(*impossible)  # without enforce_expected the run only records it
    with pytest.raises(SystemExit) as ended:
        command(*impossible, "enforce_expected=true")
    assert "val/loss" in str(ended.value)

    capsys.readouterr()
    command(*impossible, "resume=last")  # enforce_expected of the first call is not inherited
    assert re.search(r"finished at step 1\b.*trainer\.max_steps", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        command(*impossible, "resume=last", "enforce_expected=true")
    command(*EXPERIMENT, "trainer.max_steps=1", "expected={val/loss: {at_most: 1000}}", "enforce_expected=true")


def test_resuming_an_unknown_run_raises(command):
    with pytest.raises(FileNotFoundError, match="resume=nope"):
        command(*EXPERIMENT, "resume=nope")
