"""Submission: every point is checked before the first is submitted; jobs, states, and submitting again."""

import functools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import DictConfig

from blueberry_video import submit
from blueberry_video.config import compose
from blueberry_video.launch import command_line, job_states, points, snapshot, submission
from blueberry_video.launch.point_job import PointJob
from blueberry_video.launch.sweep_folder import SweepFolder

EXPERIMENT = """
defaults: [train, override model: videomae/tiny, override task: masked_pixels, override data: sprites, _self_]
name: mine
"""


class FakeSlurm:
    """Stands in for submitit's ``SlurmExecutor``; a job gets the next number."""

    submitted: list[list[PointJob]]

    def __init__(self, folder: Path) -> None:
        self.parameters: dict = {}

    def update_parameters(self, **parameters) -> None:
        FakeSlurm.parameters.append(parameters)

    def submit_array(self, jobs: list[PointJob]) -> list[SimpleNamespace]:
        FakeSlurm.submitted.append(jobs)
        identifier = str(100 + len(FakeSlurm.submitted))
        if len(jobs) == 1:
            return [SimpleNamespace(job_id=identifier)]
        return [SimpleNamespace(job_id=f"{identifier}_{index}") for index in range(len(jobs))]


@functools.cache
def composed(file: Path, words: tuple[str, ...]) -> DictConfig:
    """Composes a config once: the tests use the same ones."""
    return compose(file, words)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[FakeSlurm]:
    submitit = pytest.importorskip("submitit", reason="submitit is not installed")
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "experiments/mine/config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(EXPERIMENT)
    monkeypatch.setattr(submitit, "SlurmExecutor", FakeSlurm)
    monkeypatch.setattr(submission, "check_slurm", lambda: None)
    monkeypatch.setattr(command_line, "compose", lambda file, words: composed(file, tuple(words)))
    monkeypatch.setattr(snapshot, "_copy_tree", lambda root, target: None)
    FakeSlurm.submitted, FakeSlurm.parameters = [], []
    return FakeSlurm


def run(*words: str) -> Path:
    """Submits with the profile ``slurm``; returns the folder of the newest submission."""
    submit.main(["--config-dir", "experiments/mine", "--cluster", "slurm", *words])
    return max(Path("outputs/mine/submissions").glob("*"), key=lambda path: SweepFolder(path).record["started"])


def test_sweep_is_one_array(slurm: type[FakeSlurm], capsys):
    folder = run("seed=1,2", "trainer.max_steps=3", "--at-once", "1", "cluster.hours=2")
    assert "submitted 2 of 2 points: Slurm 101;" in capsys.readouterr().out
    [jobs], [parameters] = slurm.submitted, slurm.parameters
    assert (parameters["array_parallelism"], parameters["time"], parameters["ntasks_per_node"]) == (1, 120, 1)
    copy = folder.absolute() / "code/experiment/mine"
    words = ["--config-dir", str(copy), "--config-name", "config"]
    assert [job.words for job in jobs] == [
        ["blueberry_video.train", *words, f"seed={seed}", "trainer.max_steps=3"] for seed in (1, 2)
    ]
    variables = jobs[1].environment
    assert variables["BLUEBERRY_VIDEO_REQUEUE"] == "1"
    assert variables[points.FILE_VARIABLE] == str(folder.absolute() / "points/1.json")
    assert jobs[0].folder == os.getcwd()
    record = SweepFolder(folder).record
    assert record["jobs"] == {"0": "101_0", "1": "101_1"}
    assert record["git"] == {"commit": None, "dirty": None, "diff_hash": None}


def test_two_submissions_in_one_second_have_two_folders(slurm: type[FakeSlurm], monkeypatch: pytest.MonkeyPatch):
    class Clock(submit.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2030, 1, 2, 3, 4, 5)

    monkeypatch.setattr(submit, "datetime", Clock)
    run("seed=1")
    run("seed=1")
    names = sorted(path.name for path in Path("outputs/mine/submissions").glob("*"))
    assert names == ["2030-01-02_03-04-05", "2030-01-02_03-04-05_2"]


def test_points_with_other_processes_are_other_jobs(slurm: type[FakeSlurm]):
    folder = run("trainer.devices=1,2", "seed=0,1")
    assert [parameters["ntasks_per_node"] for parameters in slurm.parameters] == [1, 2]
    assert SweepFolder(folder).record["jobs"] == {"0": "101_0", "1": "101_1", "2": "102_0", "3": "102_1"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=1,2", "model.encoder.num_heads=3,5"], "num_heads"),
        (["seed=1", "cluster.partitoin=x"], r"`partitoin`.*`partition`"),
        (["optimizer.lr=interval(1e-4,1e-3)"], r"`optimizer\.lr=interval"),
        (["seed=1", "hydra/launcher=basic"], r"`hydra/launcher=basic`"),
        (["seed=1", "trainer=gpu"], r"cluster\.gpus_per_node=1"),
        (["seed=1", "resume=last"], r"`resume=last`"),
    ],
)
def test_an_invalid_submission_submits_nothing(slurm: type[FakeSlurm], words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        run(*words)
    assert slurm.submitted == []
    assert not Path("outputs").exists()


def test_points_that_did_not_finish_are_submitted_again(slurm: type[FakeSlurm], monkeypatch: pytest.MonkeyPatch):
    states = {"101_0": "RUNNING", "101_1": "COMPLETED", "101_2": "FAILED", "101_3": "TIMEOUT"}
    monkeypatch.setattr(job_states, "slurm_states", lambda: states)
    folder = run("seed=0,1,2,3,4")
    points.update(points.file_of(folder, 1), state="finished")
    points.update(points.file_of(folder, 2), state="failed", error="bad")
    found = job_states.states_of(folder, states)
    assert found == {0: "running", 1: "finished", 2: "failed", 3: "interrupted", 4: "lost"}
    with pytest.raises(ValueError, match=r"RESUME=last.*seed=0,1,2,3,4"):
        run("seed=0,1", "--resume", "last")
    with pytest.raises(FileNotFoundError, match=r"RESUME=no\).*last"):
        run("seed=0,1,2,3,4", "--resume", "no")
    assert run("seed=0,1,2,3,4", "--retry", "failed") == folder
    assert [job.words[-1] for job in slurm.submitted[-1]] == ["seed=2"]
    assert points.read(folder)[2]["state"] == "pending"
    states["102"] = "PENDING"
    assert run("seed=0,1,2,3,4", "--resume", "last") == folder
    assert [job.words[-1] for job in slurm.submitted[-1]] == ["seed=3", "seed=4"]
    assert "code_3/" in slurm.submitted[-1][0].words[2], "a new snapshot"
    jobs = {"0": "101_0", "1": "101_1", "2": "102", "3": "103_0", "4": "103_1"}
    assert SweepFolder(folder).record["jobs"] == jobs
    states.update({"103_0": "RUNNING", "103_1": "PENDING"})
    with pytest.raises(ValueError, match=r"no point to submit again.*running"):
        run("seed=0,1,2,3,4", "--resume", "last")


def test_job_that_is_refused_cancels_the_others(slurm: type[FakeSlurm], monkeypatch: pytest.MonkeyPatch):
    from submitit.core.utils import FailedJobError

    canceled = []

    class Refused(FakeSlurm):
        def submit_array(self, jobs: list[PointJob]) -> list[SimpleNamespace]:
            if FakeSlurm.submitted:
                raise FailedJobError("sbatch: error: invalid partition specified: x")
            return super().submit_array(jobs)

    monkeypatch.setattr("submitit.SlurmExecutor", Refused)
    monkeypatch.setattr(submission, "cancel", canceled.append)
    with pytest.raises(RuntimeError, match=r"sbatch.*invalid partition specified: x"):
        run("trainer.devices=1,2")
    assert canceled == ["101"]


def test_job_becomes_the_training_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(os, "execve", lambda *arguments: calls.append(arguments))
    monkeypatch.setenv("REMOVED", "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.chdir(tmp_path)
    PointJob(["module", "word"], str(tmp_path), {"A": "b", "REMOVED": None}, threads=3)()
    [(_, words, variables)] = calls
    assert words[1:] == ["-m", "module", "word"]
    assert (variables["A"], variables["OMP_NUM_THREADS"], "REMOVED" in variables) == ("b", "3", False)


def test_states_of_slurm_are_read_from_both_commands(monkeypatch: pytest.MonkeyPatch):
    outputs = {"squeue": "5_0|RUNNING\n6|PENDING\n", "sacct": "4|CANCELLED by 0\n5_0|PENDING\n"}
    monkeypatch.setattr(job_states, "_run", lambda *command: outputs.get(command[0]))
    assert job_states.slurm_states() == {"4": "CANCELLED", "5_0": "RUNNING", "6": "PENDING"}
    monkeypatch.setattr(job_states, "_run", lambda *command: None)
    assert job_states.slurm_states() is None


def test_slurm_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(submission.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"cluster\.executor=slurm.*sbatch.*CLUSTER=local"):
        submission.check_slurm()


def test_record_of_a_point_is_json(slurm: type[FakeSlurm]):
    folder = run("seed=1")
    assert json.loads(points.file_of(folder, 0).read_text())["command"][-1] == "seed=1"
