"""Table of submitted and local runs: states, steps, metrics, and logs of failed ones; without Slurm too."""

import fcntl
import json
import multiprocessing
from pathlib import Path

import pytest

from blueberry_video import runs
from blueberry_video.launch import job_states, points
from blueberry_video.launch.sweep_folder import SweepFolder


def write_run(name: str, status: str, started: str, step: int | None = None, metrics: dict | None = None) -> Path:
    run = Path("outputs/mine", name).absolute()
    run.mkdir(parents=True)
    record = {"status": status, "started": started, "metrics": metrics or {}, "step": step, "error": "Boom: bad"}
    (run / "run.json").write_text(json.dumps(record))
    (run / "config.yaml").write_text("name: mine\ntrainer:\n  _target_: x\n  max_steps: 30\n  devices: 1\n")
    return run


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job_states, "slurm_states", lambda: {"7_0": "COMPLETED", "7_1": "RUNNING", "7_2": "FAILED"})
    monkeypatch.setattr(points, "key", lambda config: str(config["seed"]))
    monkeypatch.setattr(points, "metric_names", lambda config: ["val/loss"])
    records = [points.describe(seed, ["lr=1", f"seed={seed}"], {"seed": seed}) for seed in range(4)]
    jobs = {str(number): f"7_{number}" for number in range(4)}
    folder = SweepFolder.create(Path("outputs/mine/submissions/s"), records, executor="slurm", jobs=jobs, keys=[])
    folder.update(started="2030-01-01T10:00:00+00:00")
    finished = write_run("r0", "finished", "2030-01-01T10:01:00+00:00", 30, {"val/loss": 0.25})
    running = write_run("r1", "running", "2030-01-01T10:02:00+00:00")
    (running / "metrics.csv").write_text("step,train/loss\n10,0.5\n20,0.4\n")
    points.update(points.file_of(folder.path, 0), state="finished", run=str(finished))
    points.update(points.file_of(folder.path, 1), state="running", run=str(running))
    points.update(points.file_of(folder.path, 2), state="running")
    (folder.path / "logs").mkdir()
    for end in ("out", "err"):
        (folder.path / "logs" / f"7_2_0_log.{end}").touch()
    write_run("local", "failed", "2030-01-01T09:00:00+00:00", 5)
    write_run("killed", "running", "2030-01-01T11:00:00+00:00")


@pytest.mark.usefixtures("outputs")
def test_table(capsys):
    runs.main(["mine"])
    table, *notes = capsys.readouterr().out.split("\n\n")
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == runs.COLUMNS
    assert [line[:5] for line in lines[1:]] == [
        ["-", "mine", "-", "local", "failed"],
        ["7_2", "mine", "seed=2", "-", "failed"],
        ["7_3", "mine", "seed=3", "-", "lost"],
        ["7_0", "mine", "seed=0", "r0", "finished"],
        ["7_1", "mine", "seed=1", "r1", "running"],
        ["-", "mine", "-", "killed", "lost"],
    ]
    assert [line[5] for line in lines[1:]] == ["5/30", "-", "-", "30/30", "20/30", "0/30"]
    assert lines[4][-2:] == ["val/loss", "0.25"]
    assert notes[0] == "mine local failed: Boom: bad"
    logs = " ".join(f"outputs/mine/submissions/s/logs/7_2_0_log.{end}" for end in ("err", "out"))
    assert notes[1].endswith(f"seed=2 failed. Log: {logs}")


@pytest.mark.usefixtures("outputs")
def test_number_of_rows_is_limited(capsys):
    runs.main(["--last", "1"])
    output = capsys.readouterr().out
    assert [line.split()[3] for line in output.splitlines()[1:2]] == ["killed"]
    assert "the newest 1 of 6" in output


@pytest.mark.usefixtures("outputs")
def test_without_slurm_the_records_are_shown(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(job_states, "slurm_states", lambda: None)
    runs.main([])
    output = capsys.readouterr().out
    assert [line.split()[4] for line in output.splitlines()[2:6]] == ["running", "pending", "finished", "running"]


def test_local_sweep_is_running_while_its_folder_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "s"
    context = multiprocessing.get_context("fork")
    locked, done = context.Event(), context.Event()

    def hold() -> None:
        with (folder / ".lock").open("a+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            locked.set()
            done.wait(20)

    monkeypatch.setattr(points, "key", lambda config: "k")
    monkeypatch.setattr(points, "metric_names", lambda config: [])
    records = [points.describe(number, [], {}) for number in range(2)]
    SweepFolder.create(folder, records, keys=[], jobs={"0": "1"}).unlock()
    points.update(points.file_of(folder, 0), state="running")
    process = context.Process(target=hold)
    process.start()
    assert locked.wait(10)
    states = job_states.states_of(folder, None)
    done.set()
    process.join()
    assert states == {0: "running", 1: "pending"}
    assert job_states.states_of(folder, None) == {0: "lost", 1: "lost"}


def test_experiment_without_runs_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs.main([])
    assert "no runs in outputs" in capsys.readouterr().out
    Path("outputs/mine").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"EXP=mnie .*`mine`"):
        runs.main(["mnie"])
