"""Runs of a job that the batch system starts again, and runs that several processes create at once."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from blueberry_video.experiment.resumption import begun, run_of_job
from blueberry_video.experiment.run_folder import RunFolder, list_runs
from blueberry_video.launch import scheduler

SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME")


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Returns a function that sets the variables of a Slurm job."""

    def enter(number: int, restart: int = 0, array: tuple[int, int] | None = None) -> None:
        for name in SLURM:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("SLURM_JOB_ID", str(number))
        if restart:
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        if array:
            monkeypatch.setenv("SLURM_ARRAY_JOB_ID", str(array[0]))
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(array[1]))

    return enter


@pytest.fixture
def config(tmp_path: Path) -> DictConfig:
    trainer = {"max_steps": 4}
    return OmegaConf.create(
        {"name": "idea", "seed": 7, "resume": None, "output_dir": str(tmp_path), "trainer": trainer}
    )


def test_requeued_job_continues_its_run(job: Callable, config: DictConfig):
    job(5)
    with begun(config, None).run as run:
        wandb = run.record["wandb"]["id"]
        run.fail(SystemExit(143))
    other = OmegaConf.merge(config, {"seed": 8})
    with begun(other, None).run as second:
        assert second.path != run.path
    assert run_of_job(config) is None, "the same start of the job"
    job(5, restart=1)
    assert (run_of_job(config), run_of_job(other)) == (run.name, second.name)
    assert run_of_job(OmegaConf.merge(config, {"seed": 9})) is None
    again = begun(config, None)
    with again.run:
        assert (again.run.path, again.complete, again.run.resumed) == (run.path, False, True)
        record = again.run.record
        assert (record["wandb"]["id"], record["job"]["restart"], len(record["resumes"])) == (wandb, 1, 1)
        with pytest.raises(BlockingIOError, match=r"in use by process \d+ on"):
            refused_in_another_process(config, run.name)
    job(6, restart=1)
    assert run_of_job(config) is None, "a different job"


def refused_in_another_process(config: DictConfig, run: str) -> None:
    """Resumes a run in a forked process; raises its error."""
    context = multiprocessing.get_context("fork")
    errors = context.SimpleQueue()

    def resume() -> None:
        try:
            RunFolder.resume("idea", run, config.output_dir)
            errors.put(None)
        except BaseException as error:
            errors.put(error)

    process = context.Process(target=resume)
    process.start()
    error = errors.get()
    process.join()
    if error is not None:
        raise error


def test_elements_of_an_array_are_different_jobs(job: Callable, config: DictConfig):
    names = {}
    for index in (0, 1):
        job(10 + index, array=(10, index))
        with begun(config, None).run as run:
            names[index] = run.name
            run.fail(SystemExit(143))
    for index in (0, 1):
        job(10 + index, restart=1, array=(10, index))
        assert run_of_job(config) == names[index]


def test_finished_run_of_a_requeued_job_is_not_trained_again(job: Callable, config: DictConfig):
    job(5)
    with begun(config, None).run as run:
        run.finish({"val/loss": 0.5}, "trainer.max_steps=4 reached", 4)
    (run.path / "checkpoints").mkdir()
    job(5, restart=1)
    with pytest.raises(FileNotFoundError, match="is finished and has no checkpoint"):
        begun(config, None)
    assert run.record["metrics"] == {"val/loss": 0.5}


@pytest.mark.parametrize(
    ("variable", "state", "commands"),
    [
        ("1", "RUNNING None", 2),
        ("1", "COMPLETING TimeLimit", 2),
        ("1", "COMPLETING None", 1),
        ("1", "CANCELLED None", 1),
        ("0", "RUNNING None", 0),
    ],
    ids=["requeued", "time-limit", "scancel", "canceled", "not-asked-for"],
)
def test_requeue(job: Callable, variable: str, state: str, commands: int, tmp_path: Path, monkeypatch):
    calls = tmp_path / "calls"
    for name in ("squeue", "scontrol"):
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\necho {name} $* >> {calls}\necho {state}\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv(scheduler.REQUEUE_VARIABLE, variable)
    job(12, array=(10, 2))
    assert scheduler.requeue() == (commands == 2)
    lines = calls.read_text().splitlines() if calls.is_file() else []
    assert len(lines) == commands
    assert ("scontrol requeue 10_2" in lines) == (commands == 2)


def test_two_processes_create_20_runs_in_20_folders(tmp_path: Path, config: DictConfig):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)

    def create() -> None:
        start.wait()
        for _ in range(10):
            RunFolder.create(config, tmp_path)

    processes = [context.Process(target=create) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    runs = list_runs(tmp_path / "idea")
    assert len(runs) == 20
    assert len({RunFolder.open(run).record["wandb"]["id"] for run in runs}) == 20
