"""Kills at random moments change nothing, and a difference is found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blueberry_video.launch import torture

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("logger=csv", "trainer.max_steps=12", "callbacks.checkpoints.every_n_steps=2", "data.batch_size=4"),
    *("data.train.size=24", "data.val.size=8", "model.encoder.depth=1", "expected={}"),
]


def test_killed_runs_equal_the_uninterrupted_one(tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "blueberry_video.launch.torture",
        "--config-dir",
        str(ROOT / "experiments/template"),
    ]
    result = subprocess.run(
        [*command, "--kills", "3", "--out", str(tmp_path), *SMALL], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 kills" in result.stdout
    assert ": 0 differ" in result.stdout


def finished(folder: Path, **changes: float) -> Path:
    """Writes a finished run with one checkpoint."""
    values = {"weight": 1.0, "ema": 2.0, "loss": 3.0, "metric": 4.0, "seconds": 5.0} | changes
    (folder / "checkpoints").mkdir(parents=True)
    state = {"state_dict": {"w": torch.tensor([values["weight"]])}, "callbacks": {"EMA": [torch.tensor(values["ema"])]}}
    torch.save(
        state | {"metrics": {"throughput/clips_per_s": values["seconds"]}}, folder / "checkpoints/step_00000001.ckpt"
    )
    (folder / "metrics.csv").write_text(f"step,loss,throughput/clips_per_s\n1,{values['loss']},{values['seconds']}\n")
    (folder / "run.json").write_text(json.dumps({"metrics": {"val/loss": values["metric"]}, "status": "finished"}))
    return folder


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"seconds": 9.0}, []),
        ({"weight": 1.0 + 2**-23}, ["state_dict.w"]),
        ({"ema": 3.0}, ["callbacks.EMA[0]"]),
        ({"loss": 3.1}, ["metrics.csv step 1: loss"]),
        ({"metric": 4.1}, ["metrics of run.json"]),
    ],
)
def test_differences_are_found(change: dict, expected: list[str], tmp_path: Path):
    first, second = finished(tmp_path / "first"), finished(tmp_path / "second", **change)
    assert list(torture._differences(first, second)) == expected


def test_phase_of_a_kill_is_read_from_the_files(tmp_path: Path):
    run = finished(tmp_path / "run")
    assert torture._phase(None) == "start"
    assert torture._phase(run) == "end"
    (run / "run.json").write_text(json.dumps({"status": "running"}))
    assert torture._phase(run) == "training"
    (run / "checkpoints" / "step_00000002.ckpt.tmp").write_text("")
    assert torture._phase(run) == "saving"
