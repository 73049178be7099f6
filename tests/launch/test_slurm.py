"""Runs in jobs of a real Slurm: tasks of one step, and a job that is requeued."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def has_slurm() -> bool:
    command = ["sinfo", "--noheader", "--format=%t"]
    try:
        states = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return any(state.startswith(("idle", "mix", "alloc")) for state in states.split())


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("sinfo") is None or not has_slurm(), reason="sinfo shows no Slurm node"),
]

SLOW = """
import os, sys, time
if "SLURM_PROCID" in os.environ and "blueberry_video.train" in sys.orig_argv:
    from blueberry_video import callbacks
    class Slow(callbacks.NaNGuard):
        def on_train_batch_start(self, trainer, *arguments):
            if trainer.global_step >= 2 and "SLURM_RESTART_COUNT" not in os.environ:
                time.sleep(1)
    callbacks.NaNGuard = Slow
"""
TRAIN = ["-m", "blueberry_video.train", "--config-dir", str(ROOT / "experiments" / "probe")]
TRAIN += ["model.freeze_encoder=false", "model.encoder.depth=1", "logger=csv", "data.num_workers=0"]
TRAIN += ["data.train.size=32", "data.val.size=8", "data.batch_size=4", "trainer=ddp", "trainer.accelerator=cpu"]
TRAIN += ["trainer.precision=32-true", "trainer.log_every_n_steps=1"]
TRAIN += ["callbacks.checkpoints.every_n_steps=1000", "trainer.max_steps=60", "trainer.check_val_every_n_epoch=1000"]


def variables(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(folder), str(ROOT / "src")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "BLUEBERRY_VIDEO_REQUEUE": "1"}


def wait(condition, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.5)


def state(job: str) -> str:
    command = ["scontrol", "--oneliner", "show", "job", job]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(word.split("=", 1) for word in text.split() if "=" in word)["JobState"]


def submit(folder: Path, tasks: int) -> str:
    """Submits a training job; returns its id."""
    (folder / "sitecustomize.py").write_text(SLOW)
    script = folder / "job.sh"
    words = " ".join(f"'{word}'" for word in [sys.executable, *TRAIN, f"trainer.devices={tasks}"])
    script.write_text(f"#!/bin/bash\nsrun {words}\ncode=$?\necho exit code $code\nexit $code\n")
    command = ["sbatch", "--parsable", f"--ntasks={tasks}", "--requeue", "--open-mode=append", "--output=job.log"]
    submitted = subprocess.run(
        [*command, str(script)], cwd=folder, env=variables(folder), capture_output=True, text=True, check=True
    )
    return submitted.stdout.strip()


def rows(folder: Path) -> int:
    return sum(file.read_text().count("\n") for file in folder.glob("outputs/probe/*/metrics.csv"))


def test_canceled_job_saves_a_checkpoint_and_stays_canceled(tmp_path: Path):
    job = submit(tmp_path, tasks=1)
    try:
        wait(lambda: rows(tmp_path) > 3, 300, "no step")
        subprocess.run(["scancel", job], check=True)
        [file] = tmp_path.glob("outputs/probe/*/run.json")
        wait(lambda: json.loads(file.read_text())["status"] == "interrupted", 60, "not interrupted")
        time.sleep(2)  # a requeue follows
        wait(lambda: state(job) != "COMPLETING", 60, "not ended")
        assert state(job) == "CANCELLED", (tmp_path / "job.log").read_text()
    finally:
        subprocess.run(["scancel", job], check=False)
    assert [*file.parent.glob("checkpoints/*.ckpt")]


def test_job_that_is_requeued_continues_its_run(tmp_path: Path):
    """Two tasks; Slurm's warning; the job requeues itself and continues at the step at which it was warned."""
    job, log = submit(tmp_path, tasks=2), tmp_path / "job.log"

    def shown() -> str:
        return log.read_text() if log.is_file() else ""

    try:
        wait(lambda: rows(tmp_path) > 3, 300, "no step")
        subprocess.run(["scancel", "--signal=USR1", job], check=True)
        wait(lambda: "Requeued the job" in shown(), 60, "not requeued")
        [file] = tmp_path.glob("outputs/probe/*/run.json")
        [checkpoint] = file.parent.glob("checkpoints/*.ckpt")
        step = int(checkpoint.stem.removeprefix("step_"))
        assert 2 <= step < 60
        wait(lambda: state(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), 400, "not finished")
    finally:
        subprocess.run(["scancel", job], check=False)
    text = shown()
    assert state(job) == "COMPLETED", text
    assert "Stopped by SIGUSR1." in text
    assert f"from {checkpoint.name} (step {step} of 60)" in text
    assert [*tmp_path.glob("outputs/probe/*/run.json")] == [file], "one run folder"
    record = json.loads(file.read_text())
    assert record["status"] == "finished"
    assert record["job"]["id"] == job
    assert record["job"]["restart"] == 1
    assert [session["previous_status"] for session in record["resumes"]] == ["interrupted"]
    steps = [int(line.split(",")[0]) for line in (file.parent / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == sorted(set(steps))
    assert set(range(1, 60)) <= set(steps)
    assert torch.load(file.parent / "checkpoints" / "step_00000060.ckpt", weights_only=True)["global_step"] == 60
