"""Multi-process runs: the number of processes, and that only one of them writes."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
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
        (OmegaConf.create({"devices": [5, 0, 2]}), 3),
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


@pytest.mark.slow
def test_failing_process_fails_the_run(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"rank \d of the 2 processes .*`seed`.*`trainer\.devices=1`"):
        processes.start(OmegaConf.create({"sede": 3}), tmp_path, 2)


def rank(code: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)])


def write_error(file: Path, when: float, error: str) -> None:
    file.write_text(json.dumps({"time": when, "error": error, "text": ""}))


def test_first_cause_precedes_lost_connections(tmp_path: Path):
    files = [tmp_path / f"{rank}.json" for rank in range(3)]
    write_error(files[0], 1.0, "RuntimeError: [gloo/transport/tcp/pair.cc] Connection closed by peer.")
    write_error(files[1], 3.0, "ValueError: a bad clip.")
    write_error(files[2], 2.0, "ValueError: an earlier bad clip.")
    failure = processes._first_failure([1, 1, 1], [1, None, None], files)
    assert (failure.rank, failure.error) == (2, "ValueError: an earlier bad clip.")


def test_killed_rank_precedes_lost_connections(tmp_path: Path):
    files = [tmp_path / "0.json", tmp_path / "1.json"]
    write_error(files[0], 1.0, "RuntimeError: [gloo/transport/tcp/pair.cc] Connection closed by peer.")
    failure = processes._first_failure([1, -9], [1, -9], files)
    assert failure.rank == 1
    assert "SIGKILL" in failure.error
    files[1].write_text(files[0].read_text().replace("1.0", "0.5"))
    assert processes._first_failure([1, 1], [1, 1], files).rank == 1, "the earlier of two lost connections"


def test_rank_that_fails_is_named_and_the_others_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "SETTLE_SECONDS", 0.1)
    ranks = [rank("import time; time.sleep(100)"), rank("raise SystemExit(3)")]
    failure = processes._wait(ranks, [tmp_path / "0", tmp_path / "1"])
    processes.end(ranks)
    assert (failure.rank, failure.error) == (1, "it ended with exit code 3.")
    assert ranks[0].returncode == -signal.SIGTERM


def test_rank_that_ignores_the_signal_is_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.1)
    code = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(100)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    processes.end([process])
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_stopped_rank_is_reported_and_ends_the_run(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "STOPPED_NOTICE_SECONDS", 0.2)
    monkeypatch.setattr(processes, "STOPPED_SECONDS", 0.5)
    ranks = [rank("import time; time.sleep(100)") for _ in range(2)]
    ranks[1].send_signal(signal.SIGSTOP)
    failure = processes._wait(ranks, [tmp_path / "0", tmp_path / "1"])
    processes.end(ranks)
    assert failure.rank == 1
    assert str(ranks[1].pid) in failure.error
    assert f"kill -CONT {ranks[1].pid}" in capsys.readouterr().err
    assert ranks[1].returncode == -signal.SIGKILL


PARENT = """
import os, subprocess, sys
code = "from blueberry_video.launch import processes; processes.end_with_parent(); print('up', flush=True)"
code += "; import time; time.sleep(100)"
environment = {**os.environ, "BLUEBERRY_VIDEO_PARENT": str(os.getpid())}
child = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


def test_killed_parent_leaves_no_rank():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(300):
        if not is_running(child):
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the rank outlived its parent")


def is_running(process: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_rank_reports_its_error_to_the_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ZeroDivisionError), processes.reported():
        _ = 1 / 0
    monkeypatch.setenv(processes.ERROR_VARIABLE, str(tmp_path / "error.json"))
    with pytest.raises(SystemExit) as ended, processes.reported():
        _ = 1 / 0
    assert ended.value.code == 1
    record = json.loads((tmp_path / "error.json").read_text())
    assert record["error"] == "ZeroDivisionError: division by zero."
    assert "Traceback" in record["text"]


FAILING = """
import os
from blueberry_video import callbacks
class Failing(callbacks.NaNGuard):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 1:
            raise ArithmeticError("only in rank 1")
callbacks.NaNGuard = Failing
"""


def two_ranks(folder: Path, *overrides: str) -> subprocess.Popen:
    """Starts a run of two ranks; ``sitecustomize.py`` in ``folder`` is loaded in all of its processes."""
    command = [sys.executable, "-m", "blueberry_video.train", "--config-dir", str(ROOT / "experiments" / "template")]
    command += ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
    command += ["trainer.log_every_n_steps=1", "logger=csv", "data.train.size=32", "data.val.size=8"]
    command += ["data.batch_size=4", "model.encoder.depth=1", *overrides]
    path = os.pathsep.join([str(folder), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


@pytest.mark.slow
def test_error_of_rank_1_is_shown_and_recorded(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text("import os\nif 'RANK' in os.environ:\n    import failing\n")
    (tmp_path / "failing.py").write_text(FAILING)
    run = two_ranks(tmp_path, "trainer.max_steps=4")
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 1
    assert "only in rank 1" in errors
    assert "Connection closed" not in errors
    [file] = tmp_path.glob("outputs/template/*/run.json")
    record = json.loads(file.read_text())
    assert record["status"] == "failed"
    assert re.search("rank 1 of the 2 .*ArithmeticError: only in rank 1", record["error"])


@pytest.mark.slow
def test_two_processes_train_one_run_that_ends_at_a_signal_and_resumes(tmp_path: Path):
    run = two_ranks(tmp_path, "trainer.max_steps=100000", "~callbacks.progress")
    for _ in range(3000):
        rows = [file.read_text().count("\n") for file in tmp_path.glob("outputs/template/*/metrics.csv")]
        if rows and rows[0] > 2:
            break
        time.sleep(0.1)
    ps = subprocess.run(["ps", "-o", "pid=", "--ppid", str(run.pid)], capture_output=True, text=True, check=True)
    ranks = [int(line) for line in ps.stdout.split()]
    run.terminate()
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 143
    assert len(ranks) == 2
    assert not any(map(is_running, ranks))
    [file] = tmp_path.glob("outputs/template/*/run.json")
    assert json.loads(file.read_text())["status"] == "interrupted"
    assert f"SIGTERM. Continue with `make train EXP=template RESUME={file.parent.name}`" in errors

    [checkpoint] = file.parent.glob("checkpoints/*.ckpt")
    step = int(checkpoint.stem.removeprefix("step_"))
    resumed = two_ranks(tmp_path, f"trainer.max_steps={step + 3}", "resume=last", "~callbacks.progress")
    output, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in errors + output
    assert list(file.parent.parent.iterdir()) == [file.parent], "both processes use one folder"
    record = json.loads(file.read_text())
    assert record["status"] == "finished"
    assert record["metrics"]["val/loss"] > 0
    assert (file.parent / "report.html").is_file()
    assert output.count("report.html") == 1, "one process prints the summary"
    with (file.parent / "metrics.csv").open() as rows:
        steps, losses = zip(*((int(row["step"]), row["train/loss"]) for row in csv.DictReader(rows)))
    assert list(steps) == list(range(step + 4))
    assert losses[-1] == "", "the row of the evaluations at the end"
    assert all(losses[:-1])
