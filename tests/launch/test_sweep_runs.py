"""Sweeps of real runs: one that is killed continues, in parallel processes; plug-ins of Hydra."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ("trainer.max_steps=1", "data.train.size=16", "data.val.size=16", "logger=csv", "callbacks.media=null")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/template").symlink_to(ROOT / "experiments/template")
    return tmp_path


def start(folder: Path, *words: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "blueberry_video.cli", "sweep", "template", *TINY, *words]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(folder: Path, *words: str) -> str:
    process = start(folder, *words)
    output = process.communicate()[0].decode()
    assert process.returncode == 0, output
    return output


def points(folder: Path) -> list[dict]:
    files = sorted(folder.glob("outputs/template/sweeps/*/points/*.json"))
    return [json.loads(file.read_text()) for file in files]


def test_killed_sweep_continues(folder: Path):
    """25 s of CPU: four processes import PyTorch, and three points are trained."""
    process = start(folder, "seed=1,2,3")
    while process.poll() is None and [point["state"] for point in points(folder)][:1] != ["finished"]:
        time.sleep(0.1)
    while process.poll() is None and not points(folder)[1]["run"]:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = points(folder)
    assert [point["state"] for point in before] == ["finished", "running", "pending"]
    cores = len(os.sched_getaffinity(0))
    output = run(folder, "seed=1,2,3", "--jobs", str(min(2, cores)))
    assert "1 of 3 points finished" in output
    assert "3 of 3 points finished" in output
    after = points(folder)
    assert [point["run"] for point in after[:2]] == [point["run"] for point in before[:2]]
    assert len([*folder.glob("outputs/template/*/run.json")]) == 3, "one folder a point"
    assert all(point["metrics"]["val/loss"] > 0 for point in after)
    assert json.loads(Path(after[1]["run"], "run.json").read_text())["resumes"], "the interrupted run continued"


PLUGINS = """
import json, os, sys, time
from pathlib import Path
import hydra
from blueberry_video import config as configs
from blueberry_video.launch import command_line
from blueberry_video.launch import sweep as sweeps

def run(config, command, created):
    folder = Path("outputs/template", str(time.time_ns())).absolute()
    folder.mkdir(parents=True)
    loss = config.optimizer.lr * config.seed
    (folder / "run.json").write_text(json.dumps({"metrics": {"val/loss": loss}, "process": os.getpid()}))
    created(folder)
    return loss

@hydra.main(config_path=str(configs.CONF), config_name=None, version_base="1.3")
def sweep(config):
    return sweeps.run_point(config, run)

if __name__ == "__main__":
    sweeps.run(command_line.parse(["--multirun", "--config-dir", "experiments/template", *sys.argv[1:]]), sweep)
"""


def run_without_training(folder: Path, *words: str) -> str:
    """Runs a sweep as ``train`` does, with a function that trains nothing."""
    (folder / "fake_train.py").write_text(PLUGINS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "fake_train.py", *words]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def installed(plugin: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec("hydra_plugins") is None or (
        importlib.util.find_spec(f"hydra_plugins.{plugin}") is None
    )
    return pytest.mark.skipif(missing, reason=f"needs {plugin.replace('_', '-')}")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), marks=installed("hydra_joblib_launcher")),
        pytest.param(("hydra/launcher=submitit_local",), marks=installed("hydra_submitit_launcher")),
    ],
)
def test_launchers_of_hydra(folder: Path, words: tuple[str, ...]):
    output = run_without_training(folder, "seed=1,2", *words)
    assert "2 of 2 points finished" in output
    assert [point["objective"] for point in points(folder)] == pytest.approx([1e-3, 2e-3], rel=1)
    assert len({json.loads(Path(point["run"], "run.json").read_text())["process"] for point in points(folder)}) == 2


@installed("hydra_optuna_sweeper")
def test_sweeper_of_hydra_chooses_points_and_repeats_none(folder: Path):
    words = ("optimizer.lr=interval(1e-4,1e-2)", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=4")
    words = (*words, "hydra.sweeper.n_jobs=1", "hydra.sweeper.direction=minimize", "hydra.sweeper.sampler.seed=1")
    assert "4 of 4 points finished" in run_without_training(folder, *words)
    [sweep] = folder.glob("outputs/template/sweeps/*")
    rates = {re.search(r"optimizer\.lr=(\S+)", " ".join(point["overrides"]))[1] for point in points(folder)}
    assert len(rates) == 4
    record = json.loads((sweep / "sweep.json").read_text())
    (sweep / "sweep.json").write_text(json.dumps({**record, "ended": None}))
    (sweep / "points/2.json").unlink()  # as if the sweep was killed before
    assert "continuing the sweep" in run_without_training(folder, *words)
    assert len([*folder.glob("outputs/template/*/run.json")]) == 5, "the sampler chooses the same points"
