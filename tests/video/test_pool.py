"""Tests of the process pool: limits, crashes, order, lazy input, large results and cleanup.

The functions of the workers are in this module, which imports torch only on demand, so that workers start fast.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from blueberry_video.video.errors import BrokenVideoError, KilledError, VideoError
from blueberry_video.video.pool import Outcome, run_in_processes

MEGABYTE = 2**20


class UnpicklableError(Exception):
    def __init__(self, code: int):
        super().__init__(f"code {code}")
        self.lock = threading.Lock()


class UnreadableError(Exception):
    """Exception that can be pickled but not unpickled, since its constructor requires two arguments."""

    def __init__(self, first: str, second: str):
        super().__init__(f"{first} {second}")


def act(order: str | tuple) -> Any:
    """Function of most tests, with one behavior per order: results, errors, crashes and limits."""
    name, argument = order if isinstance(order, tuple) else (order, None)
    match name:
        case "return":
            return argument
        case "nested":
            return [outcome.value for outcome in run([("return", argument)])]
        case "process":
            return os.getpid()
        case "sleep":
            time.sleep(argument)
            return argument
        case "spin":
            while True:
                pass
        case "child":
            return subprocess.Popen(["sleep", "1000"]).pid
        case "signal":
            os.kill(os.getpid(), argument)
        case "exit":
            sys.exit(argument)
        case "allocate":
            return len(np.ones(argument * MEGABYTE, dtype=np.uint8))
        case "share":  # memory that RLIMIT_DATA does not count
            import mmap

            shared = mmap.mmap(-1, argument * MEGABYTE)
            for start in range(0, argument * MEGABYTE, MEGABYTE):
                shared[start : start + MEGABYTE] = bytes(MEGABYTE)
            time.sleep(20)
        case "broken":
            raise BrokenVideoError("no frame can be decoded")
        case "unpicklable error":
            raise UnpicklableError(7)
        case "unreadable error":
            raise UnreadableError("two", "words")
        case "unpicklable result":
            return lambda: 0
        case "temporary file":
            import tempfile

            with tempfile.NamedTemporaryFile(delete=False) as file:
                file.write(b"left behind")
            return file.name


def big_result(megabytes: int) -> dict[str, Any]:
    return {"pixels": np.arange(megabytes * MEGABYTE, dtype=np.uint8), "name": "big"}


def tensors(count: int) -> dict[str, Any]:
    import torch

    return {
        "half": torch.arange(count).to(torch.bfloat16),
        "nothing": torch.zeros(0, 3),
        "turned": torch.arange(6).reshape(2, 3).T,
        "threads": torch.get_num_threads(),
        "gradient": torch.ones(2, requires_grad=True),
    }


def run(orders, workers: int = 1, timeout: float | None = 20, memory: int | None = None, **options) -> list[Outcome]:
    limit = None if memory is None else memory * MEGABYTE
    return list(run_in_processes(act, orders, workers=workers, timeout=timeout, memory_bytes=limit, **options))


EARLIER: set[int] = set()  # processes of earlier tests, such as the resource tracker of multiprocessing


@pytest.fixture(autouse=True)
def earlier_processes():
    EARLIER.clear()
    EARLIER.update(children())


def children() -> set[int]:
    """PIDs of the processes that were started since the test began."""
    return {child.pid for child in psutil.Process().children(recursive=True)} - EARLIER


def wait_until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_failed_items_do_not_stop_the_others():
    expected = {
        ("return", 1): None,
        ("signal", signal.SIGSEGV): (KilledError, r"item 1 \(tuple\).*SIGSEGV"),
        ("signal", signal.SIGKILL): (KilledError, "SIGKILL"),
        ("exit", 3): (KilledError, r"item 3 .*code 3"),
        "broken": (BrokenVideoError, "^no frame can be decoded"),
        "unpicklable error": (VideoError, "UnpicklableError: code 7"),
        "unreadable error": (VideoError, "UnreadableError: two words"),
        "unpicklable result": (VideoError, r"item 7 \('unpicklable result'\): .*pickle"),
        ("nested", 2): None,
    }
    errors: Counter[str] = Counter()
    progress: list[tuple[int, int]] = []
    outcomes = run(expected, 1, errors=errors, on_progress=lambda done, failed: progress.append((done, failed)))
    assert [outcome.index for outcome in outcomes] == list(range(9))
    for outcome, (order, failure) in zip(outcomes, expected.items(), strict=True):
        assert outcome.item == order
        if failure is None:
            assert (outcome.value, outcome.error) == ([2] if order[0] == "nested" else order[1], None)
        else:
            assert type(outcome.error) is failure[0]
            with pytest.raises(failure[0], match=failure[1]):
                raise outcome.error
    assert "line" in outcomes[4].error.__notes__[0]  # the traceback
    assert errors == {"KilledError": 3, "BrokenVideoError": 1, "VideoError": 3}
    assert [done for done, _ in progress] == list(range(1, 10))
    assert progress[-1] == (9, 7)


def test_timeout_kills_the_worker_and_its_children():
    before = time.monotonic()
    first, spinning, last = run([("child"), ("spin"), ("return", 5)], timeout=0.5)
    assert time.monotonic() - before < 100  # the child sleeps for 1000 s
    with pytest.raises(KilledError, match=r"item 1 \('spin'\).*timeout=0\.5 s"):
        raise spinning.error
    assert 0.5 <= spinning.seconds < 60
    assert last.value == 5
    wait_until(lambda: gone(first.value))


@pytest.mark.parametrize(
    ("order", "message"),
    [("allocate", r"memory_bytes=209715200 \(\w*MemoryError"), ("share", "memory_bytes=209715200 and")],
)
def test_memory_limit_kills_the_worker(order: str, message: str):
    outcomes = run([("allocate", 50), ("return", 4), (order, 400), ("return", 5)], memory=200)
    assert [outcome.value for outcome in outcomes] == [50 * MEGABYTE, 4, None, 5]
    with pytest.raises(KilledError, match=f"item 2 .*{message}"):
        raise outcomes[2].error
    assert 45 * MEGABYTE < outcomes[0].peak_memory < 100 * MEGABYTE
    assert outcomes[1].peak_memory < 20 * MEGABYTE  # without the memory of the previous item


def test_outcomes_are_in_input_order_or_in_finishing_order():
    orders = [("sleep", 2.0), ("sleep", 0.0), ("sleep", 0.01), ("sleep", 0.0)]
    assert [outcome.index for outcome in run(orders, 2)] == [0, 1, 2, 3]
    indices = [outcome.index for outcome in run(orders, 2, ordered=False)]
    assert sorted(indices) == [0, 1, 2, 3]
    assert indices[-1] == 0


@pytest.mark.parametrize("ordered", [True, False])
def test_items_are_consumed_lazily(ordered: bool):
    taken = 0

    def endless() -> Iterator[tuple]:
        nonlocal taken
        while True:
            taken += 1
            yield "return", taken

    outcomes = run_in_processes(act, endless(), workers=2, timeout=9, memory_bytes=None, ordered=ordered)
    assert taken == 0
    assert children() == set()
    for given in range(30):
        next(outcomes)
        assert taken - given <= 2
    outcomes.close()
    assert children() == set()


def test_workers_are_reused_and_started_on_demand():
    outcomes = run(["process"] * 5, workers=1)
    assert len({outcome.value for outcome in outcomes}) == 1
    running = run_in_processes(act, ["process"], workers=8, timeout=9, memory_bytes=None)
    pid = next(running).value
    assert children() == {pid}
    assert list(running) == []
    assert gone(pid)


def test_worker_that_retains_much_memory_is_replaced():
    outcomes = run(["process", ("allocate", 10), "process"], memory=400)
    assert outcomes[0].value == outcomes[2].value
    kept = run_in_processes(keep, [0, 150, 0], workers=1, timeout=20, memory_bytes=200 * MEGABYTE)
    first, second, third = (outcome.value for outcome in kept)
    assert first == second != third


_KEPT: list[bytes] = []


def keep(megabytes: int) -> int:
    _KEPT.append(b"x" * (megabytes * MEGABYTE))
    return os.getpid()


def test_closing_early_ends_busy_workers_and_removes_their_files():
    outcomes = run_in_processes(
        act, ["child", "temporary file", "spin", "spin"], workers=2, timeout=None, memory_bytes=None, ordered=False
    )
    values = [next(outcomes).value for _ in range(2)]
    [child] = [value for value in values if isinstance(value, int)]
    [file] = [value for value in values if isinstance(value, str)]
    assert Path(file).read_bytes() == b"left behind"
    assert len(children()) >= 3
    outcomes.close()
    assert children() == set()
    wait_until(lambda: gone(child))
    assert not Path(file).parent.exists()


def test_exception_in_the_caller_ends_the_workers():
    def interrupted() -> Iterator[str]:
        yield "spin"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(interrupted(), workers=2)
    assert children() == set()


def test_large_results_are_received_from_several_workers():
    outcomes = list(run_in_processes(big_result, [200, 200, 1], workers=2, timeout=30, memory_bytes=None))
    assert [outcome.value["pixels"].nbytes for outcome in outcomes] == [200 * MEGABYTE, 200 * MEGABYTE, MEGABYTE]
    pixels = outcomes[1].value["pixels"]
    assert pixels[:: 2**19].tolist() == [0] * 400
    assert pixels[-1] == 255
    pixels[0] = 1  # writable memory of the caller


def test_time_spent_by_the_caller_does_not_count_towards_the_timeout():
    options: dict = {"workers": 2, "timeout": 1.5, "memory_bytes": None}
    for outcome in run_in_processes(big_result, [20, 20, 20], **options):
        assert outcome.error is None
        time.sleep(2)  # the next results are partly sent meanwhile


def test_tensors_round_trip_and_workers_use_one_thread():
    import torch

    [outcome] = run_in_processes(tensors, [1000], workers=1, timeout=30, memory_bytes=None)
    value = outcome.value
    assert torch.equal(value["half"], torch.arange(1000).to(torch.bfloat16))
    assert value["half"].dtype == torch.bfloat16
    assert value["nothing"].shape == (0, 3)
    assert value["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert value["gradient"].requires_grad
    assert value["threads"] == 1


def test_number_of_file_descriptors_is_constant():
    orders = [("signal", signal.SIGSEGV) if number in (15, 35) else ("return", b"x" * 100_000) for number in range(50)]
    run(orders[:1])
    before = psutil.Process().num_fds()
    outcomes = run_in_processes(act, orders, workers=1, timeout=20, memory_bytes=None)
    counts = [psutil.Process().num_fds() for _ in outcomes]
    assert max(counts[10:]) <= max(counts[:10])
    assert psutil.Process().num_fds() == before


SCRIPT = """
import sys, time
from blueberry_video.video.pool import run_in_processes
sys.path.insert(0, {folder!r})
import test_pool
outcomes = run_in_processes(test_pool.act, ["process", "child", "spin", "spin"], workers=2, timeout=None,
                            memory_bytes=None)  # no guard required: workers do not import this script
print(next(outcomes).value, next(outcomes).value, flush=True)
next(outcomes)
"""


def test_workers_end_with_a_killed_parent(tmp_path: Path):
    script = tmp_path / "parent.py"
    script.write_text(SCRIPT.format(folder=str(Path(__file__).parent)))
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        workers = {child.pid for child in psutil.Process(parent.pid).children()}
        assert len(workers) == 2
        time.sleep(0.1)  # into the endless loops
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    wait_until(lambda: all(gone(pid) for pid in workers | {pids[1]}))


GUARDLESS = """
from blueberry_video.video.pool import run_in_processes
def double(number):
    return 2 * number
{guard}
    print([outcome.value for outcome in run_in_processes(double, [1, 2], workers=1, timeout=9, memory_bytes=None)])
"""


def test_function_of_the_main_script_requires_a_guard(tmp_path: Path):
    script = tmp_path / "main.py"
    script.write_text(GUARDLESS.format(guard="if __name__ == '__main__':"))
    assert subprocess.check_output([sys.executable, str(script)], text=True) == "[2, 4]\n"
    script.write_text(GUARDLESS.format(guard="if True:"))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 1
    assert "RuntimeError" in done.stderr
    assert "if __name__ == '__main__':" in done.stderr


def test_functions_and_items_that_cannot_be_pickled_raise():
    options: dict = {"workers": 1, "timeout": 20, "memory_bytes": None}
    with pytest.raises(TypeError, match=r"function=.*lambda.*`def`"):
        run_in_processes(lambda item: item, [1], **options)
    outcomes = list(run_in_processes(act, [lambda: 0, None], **options))
    assert isinstance(outcomes[0].error, TypeError)  # the other items are processed
    assert "item 0 (function)" in str(outcomes[0].error)
    assert [outcome.index for outcome in outcomes] == [0, 1]
    [outcome] = run_in_processes(partial(pow, 2), [10], **options)
    assert outcome.value == 1024


def test_function_with_a_broken_module_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "vanishing.py").write_text("def work(item):\n    return item\n")
    monkeypatch.syspath_prepend(tmp_path)
    import vanishing

    (tmp_path / "vanishing.py").write_text("raise OSError('gone')")
    with pytest.raises(RuntimeError, match=r"(?s)import.*OSError: gone"):
        next(run_in_processes(vanishing.work, [1], workers=1, timeout=1, memory_bytes=None))
    assert children() == set()


def test_import_time_does_not_count_towards_the_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "slow_to_import.py").write_text(
        "import time\ntime.sleep(3)\ndef work(item):\n    time.sleep(0.3)\n    return item\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from slow_to_import import work

    [outcome] = run_in_processes(work, [7], workers=1, timeout=2.5, memory_bytes=None)
    assert outcome.value == 7


@pytest.mark.parametrize(
    ("limit", "message"),
    [({"workers": 0}, "workers=0"), ({"timeout": 0}, "timeout=0"), ({"memory": -1}, "memory_bytes=-")],
)
def test_limits_must_be_positive(limit: dict, message: str):
    with pytest.raises(ValueError, match=rf"{message}.*(above 0|at least 1)"):
        run([], **limit)
