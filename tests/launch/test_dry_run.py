"""Dry run: findings, and failures for runs that would fail."""

import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from blueberry_video import train
from blueberry_video.config import compose
from blueberry_video.experiment.run_folder import RunFolder
from blueberry_video.launch import dry_run as dry_runs
from blueberry_video.launch import machine

TEMPLATE = Path(__file__).resolve().parents[2] / "experiments" / "template" / "config.yaml"
TINY = ["data.train.size=16", "data.val.size=4", "data.batch_size=4", "model.encoder.depth=1", "logger=csv"]


def dry_run(tmp_path: Path, *overrides: str, expected: dict | None = None) -> None:
    config = compose(TEMPLATE, [*TINY, f"output_dir={tmp_path}", *overrides])
    config.expected = expected or {}
    dry_runs.dry_run(config, RunFolder.create, train.build)


def test_valid_run_passes_and_leaves_no_files(tmp_path: Path, capsys: pytest.CaptureFixture):
    dry_run(tmp_path)
    output = capsys.readouterr().out
    assert "FAIL" not in output
    assert "note  gradients" not in output
    for finding in ("config", "model", "callbacks", "data", "step", "checkpoint", "disk", "memory", "logger", "time"):
        assert f"  ok    {finding}" in output
    assert "16 training and 4 validation clips, video (4, 16, 3, 32, 32) torch.uint8" in output
    assert list(tmp_path.iterdir()) == []


def test_full_disk_fails(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dry_runs.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(SystemExit) as ended:
        dry_run(tmp_path)
    assert ended.value.code == 1
    assert "FAIL  disk" in capsys.readouterr().out


def test_diverging_run_fails(tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises((SystemExit, FloatingPointError)):
        dry_run(tmp_path, "optimizer.lr=1e30", "trainer.gradient_clip_val=null", "schedule=constant")


def logger_findings(overrides: list[str], capsys: pytest.CaptureFixture) -> tuple[int, str]:
    findings = dry_runs.Findings()
    dry_runs._check_logger(compose(TEMPLATE, overrides), findings)
    return findings.failed, capsys.readouterr().out


def test_wandb_online_without_a_key_fails(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_MODE")
    failed, output = logger_findings(["logger.mode=online"], capsys)
    assert failed == 1
    assert "wandb login" in output
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert logger_findings(["logger.mode=online"], capsys)[0] == 0


@pytest.mark.parametrize(
    ("environment", "overrides", "expected"),
    [
        ({"WANDB_MODE": "disabled"}, [], "disabled"),
        ({"WANDB_MODE": "dryrun"}, [], "offline"),
        ({"WANDB_MODE": ""}, [], "offline"),
        ({"WANDB_MODE": "", "WANDB_DISABLED": "true"}, [], "disabled"),
        ({"WANDB_MODE": "", "WANDB_API_KEY": "k" * 40}, [], "online"),
        ({"WANDB_MODE": "disabled"}, ["logger.mode=offline"], "offline"),
    ],
)
def test_wandb_environment_is_reported(
    environment: dict, overrides: list[str], expected: str, capsys: pytest.CaptureFixture, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    failed, output = logger_findings(overrides, capsys)
    assert failed == 0
    assert f"Wandb, {expected}" in output


def test_invalid_wandb_mode_fails(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "of")
    failed, output = logger_findings([], capsys)
    assert failed == 1
    assert re.search("WANDB_MODE='of' .*online, .*disabled", output)


def test_dry_run_never_sends_to_wandb(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert dry_runs._short_run(compose(TEMPLATE)).logger.mode == "offline"


PROBE = ["callbacks=self_supervised", "callbacks.probe_linear=null", "callbacks.probe.labels=[motion]"]
SMALL = ["callbacks.probe.train_clips=16", "callbacks.probe.val_clips=4", "callbacks.few_labels=null"]


def test_evaluations_at_the_end_are_tried(tmp_path: Path, capsys: pytest.CaptureFixture):
    dry_run(tmp_path, *PROBE, *SMALL, expected={"probe/motion": {"at_least": 0.1}})
    output = capsys.readouterr().out
    assert re.search(r"ok    evaluation .*probe/motion_gain.*val/loss", output)
    assert "FAIL" not in output


def test_evaluation_with_more_clips_than_the_data_fails(tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        dry_run(tmp_path, *PROBE, "callbacks.probe.train_clips=16")
    output = capsys.readouterr().out
    for key, clips, split in (("probe.val_clips=500", 4, "val"), ("few_labels.num_labelled=400", 16, "train")):
        assert re.search(rf"FAIL  evaluation callbacks\.{key} .* {clips} clips of data\.{split}", output)
    assert "callbacks.probe.train_clips" not in output


def test_expected_value_of_an_unknown_metric_fails(tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        dry_run(tmp_path, expected={"val/los": {"at_most": 1}})
    assert re.search(r"FAIL  expected +expected\.val/los\b", capsys.readouterr().out)


def test_callback_that_fails_in_validation_fails_the_dry_run(tmp_path: Path):
    stop = "{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/los}"
    with pytest.raises(RuntimeError, match="val/los"):
        dry_run(tmp_path, f"+callbacks.stop={stop}")


def test_several_processes_are_tried_with_two(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    started = []
    monkeypatch.setattr(dry_runs.processes, "start", lambda config, run, number: started.append((config, number)))
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=4", "trainer.precision=32-true"]
    dry_run(tmp_path, *ddp)
    [(config, number)] = started
    assert number == 2
    assert (config.trainer.devices, config.trainer.strategy, config.trainer.max_steps) == (2, "ddp", dry_runs.STEPS)
    assert not config.check
    assert "ok    processes  2 of 4" in capsys.readouterr().out


def test_sampling_is_tried_with_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import blueberry_video.tasks.diffusion as diffusion

    steps = []

    def generate(model, captions, size, sampler, *rest):
        steps.append(sampler.steps)
        return torch.zeros(len(captions), 3, 8, 16, 16)

    monkeypatch.setattr(diffusion, "generate", generate)
    overrides = ["data.train.size=24", "data.val.size=12", "data.batch_size=12", "logger=csv", "callbacks=ema"]
    overrides += ["model.transformer.depth=1"]
    file = TEMPLATE.parents[1] / "cogvideox" / "config.yaml"
    config = compose(file, [*overrides, f"output_dir={tmp_path}"])
    config.expected = {}
    dry_runs.dry_run(config, RunFolder.create, train.build)
    assert config.task.sampler.steps > dry_runs.SAMPLER_STEPS
    assert steps
    assert set(steps) == {dry_runs.SAMPLER_STEPS}
    config.task.sampler.steps = 2000
    with pytest.raises(ValueError, match=r"task\.sampler.*steps=2000\b"):
        dry_runs.dry_run(config, RunFolder.create, train.build)


def test_unused_parameter_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    def build_with_spare(config, folder):
        data, model, task, trainer = train.build(config, folder)
        model.spare = torch.nn.Parameter(torch.zeros(1))
        return data, model, task, trainer

    config = compose(TEMPLATE, [*TINY, f"output_dir={tmp_path}"])
    dry_runs.dry_run(config, RunFolder.create, build_with_spare)
    assert re.search(r"note  gradients  1 .*model\.spare", capsys.readouterr().out)


def test_available_memory_existing_parent_and_wandb_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    free = machine.available_memory()
    assert free is None or free > 0
    assert machine.existing_parent(tmp_path / "not" / "yet") == tmp_path
    assert machine.wandb_key() is None
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert machine.wandb_key() == str(netrc)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert machine.wandb_key() == "WANDB_API_KEY"


def test_short_run_changes_only_limits():
    config = compose(TEMPLATE)
    before = OmegaConf.to_container(config)
    short = dry_runs._short_run(config)
    assert OmegaConf.to_container(config) == before
    assert short.model == config.model
    assert short.data == config.data
    assert short.trainer.max_steps == dry_runs.STEPS
