"""Signals that end a run: SIGTERM, SIGINT (Ctrl-C), SIGHUP, and the warnings of batch systems, SIGUSR1 and SIGUSR2.

While a run trains, the first signal lets the current optimizer step end and a checkpoint be saved, within
``SAVE_SECONDS``. Otherwise, and for a second signal, it raises an exception in the main thread wherever it is, so that
it also ends the evaluations at the end of a run. The exit code is that of shells: 143 after SIGTERM, 130 after SIGINT.
It is 143 after a warning too: a batch system must see neither a success nor an unknown failure.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from blueberry_video.installation import start_command
from blueberry_video.launch import environment
from blueberry_video.launch.failures import LostRankError

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # Slurm's --signal=USR1@120; submitit's is SIGUSR2
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *WARNINGS)
PREEMPTED = 128 + signal.SIGTERM
REPEAT_SECONDS = 5.0  # Ctrl-C in a terminal reaches a rank twice: directly and forwarded by its parent
SAVE_SECONDS = 20.0  # for the step and the checkpoint after the first signal; batch systems kill after about 30 s
WARNED_SECONDS = 90.0  # the same after a warning

_received: tuple[signal.Signals, float] | None = None  # the last signal of this process and its time
_waiting: "Delay | None" = None  # training that saves a checkpoint before it ends
_holding = 0  # depth of `held`
_held: list[int] = []  # signals that arrived meanwhile


class Interrupted(SystemExit):
    """Exit caused by a signal, with the exit code 128 + its number, or that of SIGTERM for :data:`WARNINGS`."""

    def __init__(self, number: int):
        self.signal = signal.Signals(number)
        self.explained = False
        super().__init__(PREEMPTED if number in WARNINGS else 128 + number)

    def __str__(self) -> str:
        return self.signal.name


@contextmanager
def handled(hint: str = "", quiet: bool = False) -> Iterator[None]:
    """Context manager in which a signal of :data:`ENDING` raises :class:`Interrupted` and is reported in one line.

    Signals that are ignored (``nohup``) or have a handler of the caller are left alone. May be nested: the innermost
    hint is printed.

    Args:
        hint: sentence on how to continue.
        quiet: print nothing, in ranks: their parent reports the signal.

    Raises:
        Interrupted: after a signal, also if libraries replaced it with a different exception.
    """
    global _received
    previous = _install()
    outermost = bool(previous)
    if outermost:
        _received = None
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Interrupted):
            if _received is None or isinstance(error, LostRankError):  # torchrun sends SIGTERM after it
                raise
            error = Interrupted(_received[0])
        if not error.explained and not quiet:
            print(f"\nStopped by {error}. {hint}".rstrip(), file=sys.stderr, flush=True)
        error.explained = True
        raise error from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def how_to_continue(experiment: str, run: str, output_dir: str) -> str:
    """Returns the hint of a run: the command that resumes it."""
    elsewhere = {} if output_dir == "outputs" else {"ARGS": f"output_dir={output_dir}"}
    command = start_command("train", experiment, RESUME=run, **elsewhere)
    return f"Continue with `{command}`, or add `resume={run}` to the command."


class Delay:
    """Delays the first signal until training has saved a checkpoint, between :meth:`begin` and :meth:`end`.

    After ``SAVE_SECONDS`` without a call of :meth:`end`, ``WARNED_SECONDS`` for a warning, the signal ends the process
    without a checkpoint.

    Args:
        quiet: print nothing, and ignore a second signal within ``REPEAT_SECONDS``: in ranks, which their parent ends.
        patient: ignore a second signal: ``torchrun`` sends one as soon as one of the ranks ends.
    """

    def __init__(self, quiet: bool = False, patient: bool = False) -> None:
        self._timer: threading.Timer | None = None
        self._workers: Any = None
        self._expired = False
        self._quiet = quiet
        self._patient = patient

    def begin(self) -> None:
        global _waiting
        _waiting = self

    def end(self) -> None:
        global _waiting
        if _waiting is self:
            _waiting = None
        if self._timer is not None:
            self._timer.cancel()
        if self._workers is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, self._workers)
            self._workers = None

    @property
    def received(self) -> bool:
        """Whether a signal waits for the end of the step."""
        return self._timer is not None

    def leave(self) -> None:
        """Ends the process after the checkpoint, also where only a different rank received the signal.

        Raises:
            Interrupted: always.
        """
        self.end()
        raise Interrupted(_received[0] if _received else signal.SIGTERM)

    def start(self, number: int) -> bool:
        """Called by the handler; returns whether the signal is delayed."""
        if self._timer is not None:
            repeated = self._quiet and _received is not None and time.monotonic() - _received[1] < REPEAT_SECONDS
            return not self._expired and (self._patient or repeated)
        self._timer = threading.Timer(seconds_to_save(number), self._expire, (number,))
        self._timer.daemon = True
        self._timer.start()
        # A batch system also sends the signal to the workers of DataLoaders. Their exit must not interrupt the step.
        self._workers = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if not self._quiet and number == signal.SIGINT:
            os.write(2, b"\nsaving a checkpoint after this step; press Ctrl-C again to end at once\n")
        return True

    def _expire(self, number: int) -> None:
        self._expired = True
        os.kill(os.getpid(), number)


@contextmanager
def held() -> Iterator[None]:
    """Context manager in which signals wait for its end, for imports: an exception that a handler raises in the import
    of a C++ extension, such as Triton's, aborts the process."""
    global _holding
    _holding += 1  # another thread may receive a signal that is blocked in this one
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        _holding -= 1
        if not _holding and _held:
            number, _held[:] = _held[0], []
            signal.raise_signal(number)


def seconds_to_save(number: int) -> float:
    """Returns the time between a signal and the end of a process that cannot save a checkpoint."""
    return WARNED_SECONDS if number in WARNINGS else SAVE_SECONDS


def received() -> signal.Signals | None:
    """Returns the signal that ends this process, None if there was none."""
    return _received[0] if _received else None


def save_first(trainer: Any) -> None:
    """Makes the callback ``Checkpoints`` of a trainer save before a signal ends training, in place of Lightning's
    SIGTERM handler, which broadcasts among ranks that may wait for each other elsewhere."""
    here = environment.recognize()
    trainer._signal_connector._sigterm_notifier_fn = lambda *_: None
    for callback in trainer.callbacks:
        if hasattr(callback, "signal_delay"):
            callback.signal_delay = Delay(here.follows, here.is_external)


def _install() -> dict[int, Any]:
    """Installs the handler where there is only the default one; returns the replaced handlers."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    free = [number for number in ENDING if signal.getsignal(number) in defaults]
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        global _received
        if os.getpid() != process:  # a forked worker: its parent ends it
            if number not in (signal.SIGINT, *WARNINGS):
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if _holding:
            _held.append(number)
            return
        delay, first = _waiting, _received is None
        if first:
            _received = (signal.Signals(number), time.monotonic())
        if delay is not None:
            if delay.start(number):
                return
            delay.end()
            assert _received is not None
            raise Interrupted(_received[0])
        if first or (_received is not None and time.monotonic() - _received[1] > REPEAT_SECONDS):
            _received = (signal.Signals(number), time.monotonic())
            raise Interrupted(number)

    return {int(number): signal.signal(number, handle) for number in free}
