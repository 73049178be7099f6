"""Signals end a process with the exit code of shells and one line on how to continue."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from blueberry_video.launch import signals


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """Handlers of an interactive process; under nohup, or in the background of a script, signals are ignored."""
    handlers = dict.fromkeys(signals.ENDING, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", signals.ENDING)
def test_signal_raises_its_exit_code_and_prints_the_innermost_hint(number, capsys: pytest.CaptureFixture):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, signals.handled("outer"), signals.handled("Go on with resume=last."):
        os.kill(os.getpid(), number)
    assert ended.value.code == (143 if number in signals.WARNINGS else 128 + number)
    assert str(ended.value) == number.name
    assert capsys.readouterr().err.strip() == f"Stopped by {number.name}. Go on with resume=last."
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("replacement", [RuntimeError("DataLoader worker exited"), SystemExit(0), KeyboardInterrupt()])
def test_exception_of_a_library_after_a_signal_keeps_the_exit_code(replacement: BaseException, capsys):
    def work():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            raise replacement

    with pytest.raises(SystemExit) as ended, signals.handled("hint"):
        work()
    assert ended.value.code == 143
    assert "Stopped by SIGTERM. hint" in capsys.readouterr().err


def test_errors_without_a_signal_are_unchanged(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended, signals.handled("hint"):
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(ValueError, match="value"), signals.handled("hint"):
        raise ValueError("value")
    assert ended.value.code == 143
    assert capsys.readouterr().err.count("Stopped") == 1


def test_repeated_signal_does_not_break_the_cleanup():
    cleaned = []

    def work():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append(True)

    with pytest.raises(SystemExit), signals.handled(quiet=True):
        work()
    assert cleaned


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.handled():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_forked_workers_leave_the_signal_to_their_parent():
    code = """
import os, signal, time
from blueberry_video.launch import signals
with signals.handled("hint"):
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == f"{-signal.SIGTERM}\n"
    assert result.stderr == ""


@pytest.mark.parametrize("threads", [0, 3])
def test_signals_wait_for_the_end_of_imports(threads):
    """Also where threads of libraries exist, of which one receives the signal."""
    reached, end = [], threading.Event()
    others = [threading.Thread(target=end.wait) for _ in range(threads)]
    for thread in others:
        thread.start()

    def run() -> None:
        with signals.handled(), signals.held():
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)
            reached.append(True)

    try:
        with pytest.raises(SystemExit) as error:
            run()
    finally:
        end.set()
    assert reached
    assert error.value.code == 143
