"""Multi-process runs: the number of processes, and that only one of them writes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from blueberry_video.launch import processes

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("trainer", "number"),
    [
        ({}, 1),
        ({"devices": 4}, 4),
        ({"devices": "3"}, 3),
        ({"devices": [0, 2]}, 2),
        ({"devices": "auto", "accelerator": "cpu"}, 1),
        ({"devices": -1, "accelerator": "cpu"}, 1),
    ],
)
def test_number_of_processes(trainer: dict, number: int):
    assert processes.count(trainer) == number


def test_all_gpus_without_a_gpu_raises(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"trainer\.devices=-1 .*`trainer=cpu`"):
        processes.count({"devices": -1, "accelerator": "gpu"})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert processes.count({"devices": -1, "accelerator": "gpu"}) == 8


def test_rank_starts_no_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv(processes.FOLDER_VARIABLE, str(tmp_path))
    assert processes.count({"devices": 4}) == 1
    assert processes.shared_folder() == tmp_path
    monkeypatch.delenv(processes.FOLDER_VARIABLE)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert processes.count({"devices": 4}) == 1


@pytest.mark.slow
def test_two_processes_train_one_run_in_one_folder(tmp_path: Path):
    command = [sys.executable, "-m", "blueberry_video.train", "--config-dir", str(ROOT / "experiments" / "template")]
    command += ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
    command += ["trainer.max_steps=3", "trainer.log_every_n_steps=1", "logger=csv", "~callbacks.progress"]
    command += ["data.train.size=32", "data.val.size=8", "data.batch_size=4", "model.encoder.depth=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    [folder] = (tmp_path / "outputs" / "template").iterdir()
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["metrics"]["val/loss"] > 0
    steps = [int(row["step"]) for row in csv.DictReader((folder / "metrics.csv").open())]
    assert steps == sorted(set(steps))
    assert (folder / "report.html").is_file()
    assert result.stdout.count("report.html") == 1, "one process prints the summary"
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in result.stderr + result.stdout


@pytest.mark.slow
def test_failing_process_fails_the_run(tmp_path: Path, capfd: pytest.CaptureFixture):
    with pytest.raises(RuntimeError, match=r"2 processes .*exit code 1\b.*`trainer\.devices=1`"):
        processes.start(OmegaConf.create({"sede": 3}), tmp_path, 2)
    assert "`seed`" in capfd.readouterr().err, "its own error is printed"
