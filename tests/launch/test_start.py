"""Start of the ranks of a run: their command, environment, signals and errors."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from blueberry_video.launch import processes
from blueberry_video.launch.signals import Interrupted


class Rank:
    """Mock of a rank that records its command, environment and signals."""

    started: list["Rank"]
    codes: dict[int, int]
    on_start: Callable[["Rank"], None]

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.command, self.environment, self.signals = command, env, list[int]()
        self.number = len(self.started)
        self.pid = os.getpid()
        self.config = OmegaConf.load(command[-1])
        self.started.append(self)
        self.on_start()

    def on_start(self) -> None:
        """Runs when the process starts."""

    def poll(self) -> int | None:
        return self.codes.get(self.number, 0)

    def send_signal(self, number: int) -> None:
        self.signals.append(number)
        self.codes[self.number] = -number

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int | None:
        return self.poll()


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns the list of started ranks, mocks of processes that succeed."""
    started: list[Any] = []
    monkeypatch.setattr(Rank, "started", started, raising=False)
    monkeypatch.setattr(Rank, "codes", {}, raising=False)
    monkeypatch.setattr(processes.subprocess, "Popen", Rank)
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(processes, "SETTLE_SECONDS", 0.01)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return started


def test_environment_of_each_rank(ranks: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes.os, "cpu_count", lambda: 13)
    monkeypatch.setenv("MY_VARIABLE", "kept")
    monkeypatch.setenv("RANK", "7")  # of an outer launcher
    reached = []

    def connect(rank: Rank) -> None:
        with socket.create_connection(("127.0.0.1", int(rank.environment["MASTER_PORT"])), timeout=5):
            reached.append(rank.number)

    monkeypatch.setattr(Rank, "on_start", connect)
    processes.start(OmegaConf.create({"name": "x", "depth": [1, 2]}), tmp_path / "run", 3)
    assert reached == [0, 1, 2], "the store runs in this process"
    errors = [rank.environment.pop(processes.ERROR_VARIABLE) for rank in ranks]
    assert [Path(error).name for error in errors] == ["error-0.json", "error-1.json", "error-2.json"]
    for number, rank in enumerate(ranks):
        expected = {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": "3",
            "LOCAL_WORLD_SIZE": "3",
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": ranks[0].environment["MASTER_PORT"],
            "OMP_NUM_THREADS": "4",
            "MY_VARIABLE": "kept",
            "TORCHELASTIC_RUN_ID": "none",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "BLUEBERRY_VIDEO_RUN_FOLDER": str(tmp_path / "run"),
            "BLUEBERRY_VIDEO_PARENT": str(os.getpid()),
        }
        assert {key: rank.environment.get(key) for key in expected} == expected
        assert rank.command[:3] == [sys.executable, "-m", "blueberry_video.train"]
        assert rank.config == {"name": "x", "depth": [1, 2]}
        assert not Path(rank.command[3]).exists(), "removed at the end"
        assert rank.signals == []


@pytest.mark.parametrize(("cores", "given", "threads"), [(2, None, "1"), (None, None, "1"), (64, "5", "5")])
def test_threads_of_a_rank(
    ranks: list[Any], tmp_path: Path, cores: int | None, given: str | None, threads: str, monkeypatch
):
    monkeypatch.setattr(processes.os, "cpu_count", lambda: cores)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    processes.start(OmegaConf.create({"name": "x"}), tmp_path, 4)
    assert {rank.environment["OMP_NUM_THREADS"] for rank in ranks} == {threads}


def test_error_of_a_rank_is_printed_and_raised(ranks: list[Any], tmp_path: Path, capsys, monkeypatch):
    def fail(rank: Rank) -> None:
        if rank.number == 2:
            failure = {"time": 5.0, "error": "ArithmeticError: odd.", "text": "Traceback of rank 2"}
            Path(rank.environment[processes.ERROR_VARIABLE]).write_text(json.dumps(failure))
            Rank.codes.update({0: None, 1: None, 2: 1})

    monkeypatch.setattr(Rank, "on_start", fail)
    with pytest.raises(
        RuntimeError, match=rf"rank 2 of the 3 .*{tmp_path}.*ArithmeticError: odd\. .*`trainer\.devices=1`"
    ):
        processes.start(OmegaConf.create({"name": "x"}), tmp_path, 3)
    assert capsys.readouterr().err == "Traceback of rank 2\n"
    assert [rank.signals for rank in ranks] == [[signal.SIGTERM], [signal.SIGTERM], []]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_signal_of_the_parent_is_forwarded(ranks: list[Any], tmp_path: Path, number: int, monkeypatch):
    def interrupt(rank: Rank) -> None:
        Rank.codes[rank.number] = None
        if rank.number == 1:
            raise Interrupted(number)

    monkeypatch.setattr(Rank, "on_start", interrupt)
    with pytest.raises(Interrupted):
        processes.start(OmegaConf.create({"name": "x"}), tmp_path, 3)
    assert ranks[0].signals == [number]


def process(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code])


def test_ranks_that_end_one_after_the_other_succeed(tmp_path: Path):
    ranks = [process(f"import time; time.sleep({seconds})") for seconds in (0.4, 0.0, 0.2)]
    assert processes._wait(ranks, [tmp_path / str(number) for number in range(3)]) is None
    assert [rank.returncode for rank in ranks] == [0, 0, 0]


def test_rank_that_continues_after_a_stop_does_not_end_the_run(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    states = iter([True, True, True, False, True, True, True, False])
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(processes, "STOPPED_NOTICE_SECONDS", 0.025)
    monkeypatch.setattr(processes, "STOPPED_SECONDS", 0.045)
    monkeypatch.setattr(processes, "is_stopped", lambda pid: next(states, False))
    rank = process("import time; time.sleep(0.3)")
    assert processes._wait([rank], [tmp_path / "0"]) is None
    assert capsys.readouterr().err.count(f"kill -CONT {rank.pid}") == 2, "one notice per stop"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (3, "it ended with exit code 3."),
        (-signal.SIGSEGV, "it was ended by SIGSEGV."),
        (128 + signal.SIGTERM, "it was ended by SIGTERM."),
        (-signal.SIGKILL, "it was ended by SIGKILL. If memory was short, lower `data.batch_size`."),
        (128 + signal.SIGKILL, "it was ended by SIGKILL. If memory was short, lower `data.batch_size`."),
        (255, "it ended with exit code 255."),
    ],
)
def test_description_of_an_exit_code(code: int, expected: str):
    assert processes.describe(code) == expected


def test_rank_that_failed_first_precedes_those_that_followed(tmp_path: Path):
    files = [tmp_path / str(number) for number in range(4)]
    failure = processes._first_failure([-15, None, 4, 1], [None, None, 4, None], files)
    assert (failure.rank, failure.error) == (2, "it ended with exit code 4.")
    assert processes._first_failure([0, None, 0, 0], [0, None, 0, 0], files) is None


def test_stopped_process_is_recognized():
    child = process("import time; time.sleep(60)")
    assert not processes.is_stopped(os.getpid())
    assert not processes.is_stopped(child.pid)
    child.send_signal(signal.SIGSTOP)
    end = time.monotonic() + 30
    while not processes.is_stopped(child.pid):
        assert time.monotonic() < end
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert not processes.is_stopped(child.pid), "it does not exist"


def test_process_that_is_no_rank_does_not_depend_on_its_parent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(processes.PARENT_VARIABLE, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", None)
    processes.end_with_parent()


def test_rank_of_a_parent_that_has_ended_is_killed():
    code = "from blueberry_video.launch import processes; processes.end_with_parent(); print('alive')"
    environment = {**os.environ, processes.PARENT_VARIABLE: "999999999"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert (result.returncode, result.stdout) == (-signal.SIGKILL, b"")


@pytest.mark.parametrize("failure", ["OSError", "AttributeError", "nonzero"])
def test_parent_is_watched_where_the_kernel_does_not(failure: str):
    code = f"""
import ctypes, os, time
from blueberry_video.launch import processes
class Library:
    def __getattr__(self, name):
        if {failure!r} == "nonzero":
            return lambda *_: 1
        raise {failure if failure != "nonzero" else "OSError"}
ctypes.CDLL = lambda name: Library()
processes.time.sleep = lambda seconds, sleep=time.sleep: sleep(0.01 * seconds)
os.getppid = iter([int(os.environ["BLUEBERRY_VIDEO_PARENT"])] * 3 + [1] * 99).__next__
processes.end_with_parent()
time.sleep(0)
import threading; threading.Event().wait(30)
"""
    environment = {**os.environ, processes.PARENT_VARIABLE: "77"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, check=False, timeout=60)
    assert result.returncode == -signal.SIGKILL


def test_traceback_of_a_rank_is_reported_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(processes.ERROR_VARIABLE, str(tmp_path / "error.json"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    before = time.time()
    for traceback in (False, True):
        if traceback:
            monkeypatch.setenv("BLUEBERRY_TRACEBACK", "1")
        with pytest.raises(SystemExit), processes.reported():
            processes.count({"devices": -1, "accelerator": "gpu"})
        record = json.loads((tmp_path / "error.json").read_text())
        assert record["error"].startswith("ValueError: trainer.devices=-1")
        assert not record["error"].endswith("..")
        assert ("Traceback" in record["text"]) == traceback
        assert before <= record["time"] <= time.time()


@pytest.mark.parametrize("fails", [False, True])
def test_loggers_of_a_rank_are_closed(fails: bool):
    closed: list[bool] = []
    with contextlib.suppress(ValueError), processes.rank_of(SimpleNamespace(close=closed.append)):
        if fails:
            raise ValueError
    assert closed == [not fails]
