"""Dry run: findings, and failures for runs that would fail."""

import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from blueberry_video import train
from blueberry_video.config import compose
from blueberry_video.experiment.run_folder import RunFolder
from blueberry_video.launch import check, machine

TEMPLATE = Path(__file__).resolve().parents[2] / "experiments" / "template" / "config.yaml"
TINY = ["data.train.size=16", "data.val.size=4", "data.batch_size=4", "model.encoder.depth=1", "logger=csv"]


def dry_run(tmp_path: Path, *overrides: str) -> None:
    check.dry_run(compose(TEMPLATE, [*TINY, f"output_dir={tmp_path}", *overrides]), RunFolder.create, train.build)


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
    monkeypatch.setattr(check.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(SystemExit) as ended:
        dry_run(tmp_path)
    assert ended.value.code == 1
    assert "FAIL  disk" in capsys.readouterr().out


def test_diverging_run_fails(tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises((SystemExit, FloatingPointError)):
        dry_run(tmp_path, "optimizer.lr=1e30", "trainer.gradient_clip_val=null", "schedule=constant")


def test_wandb_online_without_a_key_fails(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    config = compose(TEMPLATE, ["logger.mode=online"])
    findings = check.Findings()
    check._check_logger(config, findings)
    assert findings.failed == 1
    assert "wandb login" in capsys.readouterr().out
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    check._check_logger(config, findings)
    assert findings.failed == 1


def test_unused_parameter_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    def build_with_spare(config, folder):
        data, model, task, trainer = train.build(config, folder)
        model.spare = torch.nn.Parameter(torch.zeros(1))
        return data, model, task, trainer

    config = compose(TEMPLATE, [*TINY, f"output_dir={tmp_path}"])
    check.dry_run(config, RunFolder.create, build_with_spare)
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
    short = check._short_run(config)
    assert OmegaConf.to_container(config) == before
    assert short.model == config.model
    assert short.data == config.data
    assert short.trainer.max_steps == check.STEPS
