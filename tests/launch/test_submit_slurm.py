"""Submission to the real Slurm of this machine (`.ci/slurm`): one array, whose code is that of the submission."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blueberry_video.launch import job_states

ROOT = Path(__file__).resolve().parents[2]
TINY = ("trainer.max_steps=2", "data.train.size=32", "data.val.size=16", "logger=csv", "callbacks.media=null")
SECONDS = 400  # the machine of the tests is shared


def answers() -> bool:
    if shutil.which("sinfo") is None:
        return False
    states = subprocess.run(["sinfo", "-h", "-o", "%t"], capture_output=True, text=True, check=False).stdout
    return any(state in states for state in ("idle", "mix", "alloc"))


pytestmark = pytest.mark.skipif(not answers(), reason="sinfo shows no Slurm node")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Clone of this repository that the test edits."""
    for name in ("src", "conf", "experiments/template"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / ".gitignore").write_text("outputs/\n__pycache__/\n")
    identity = "git -c user.name=test -c user.email=test@localhost"
    command = f"git init -q . && git add . && {identity} commit -qm start"
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


def test_array_runs_the_code_of_the_submission_although_it_is_edited_later(clone: Path):
    """20 s of CPU: two training processes."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    environment = {**os.environ, "PYTHONPATH": str(clone / "src"), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    command = [
        sys.executable,
        "-m",
        "blueberry_video.cli",
        "submit",
        "template",
        *TINY,
        "seed=1,2",
        "--cluster",
        "slurm",
    ]
    result = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (clone / "src/blueberry_video/train.py").write_text("raise SystemExit('edited')\n")
    (clone / "src/blueberry_video/launch/point_job.py").write_text("raise SystemExit('edited')\n")
    (clone / "experiments/template/config.yaml").write_text("edited: [\n")
    [folder] = (clone / "outputs/template/submissions").iterdir()
    jobs = json.loads((folder / "sweep.json").read_text())["jobs"]
    assert sorted(job.partition("_")[2] for job in jobs.values()) == ["0", "1"], "one array"
    end = time.monotonic() + SECONDS
    try:
        while {"pending", "running"} & {*states(folder)} and time.monotonic() < end:
            time.sleep(1)
        logs = "\n".join(log.read_text() for log in folder.glob("logs/*.err"))
        assert states(folder) == ["finished", "finished"], logs
    finally:
        subprocess.run(["scancel", jobs["0"].partition("_")[0]], check=False)
    records = [json.loads(file.read_text()) for file in sorted(clone.glob("outputs/template/*/run.json"))]
    assert len(records) == 2, "one folder a point"
    assert {record["seed"] for record in records} == {1, 2}
    assert all(record["metrics"]["val/loss"] > 0 for record in records)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, capture_output=True, text=True, check=True)
    assert {(record["commit"], record["dirty"]) for record in records} == {(commit.stdout.strip(), False)}


def states(folder: Path) -> list[str]:
    return [*job_states.states_of(folder, job_states.slurm_states()).values()]
