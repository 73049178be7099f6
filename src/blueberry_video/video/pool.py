"""A function over many hostile items: each in a process that is ended when it takes too long, too much, or crashes.

A worker is a fresh interpreter in a session of its own, so that its whole process group can be killed. It imports the
function once and then does one item after the other; the parent talks to it over a socket and starts another one in
its place when it had to be killed. Results come back as pickles whose arrays and tensors travel beside them as raw
bytes, straight into the memory they stay in: no file and no shared memory that a killed worker could leave behind.

A process bounds time and memory and survives a crash. It is no sandbox: the function may read and write what you may.
Needs Linux (resource limits, /proc, signals of pipes).
"""

import contextlib
import fcntl
import gc
import io
import multiprocessing.spawn
import os
import pickle
import resource
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil

from blueberry_video.video.errors import KilledError, VideoError

Item = TypeVar("Item")
Value = TypeVar("Value")
_Parts = list[bytearray | memoryview]  # a message: a pickle, then the buffers that it refers to
_Transfer = Generator[int, None, Any]  # yields the selector event without which it cannot go on

START_SECONDS = 300.0  # for a new worker to import the function
_WATCH_SECONDS = 0.1  # between two looks at the clock and at the workers' memory
_STARTING = "BLUEBERRY_VIDEO_WORKER_STARTING"  # set in a worker until it has imported the function
_OUT_OF_MEMORY = "can't allocate memory"  # what torch says in a RuntimeError
_RAISE = "Leave it out, or raise that limit where the item is known to be harmless."
_SIGNALS = {number.value: number.name for number in signal.Signals}
_END = object()
_UNREADABLE = (pickle.PickleError, ImportError, AttributeError, TypeError, ValueError, KeyError, IndexError, EOFError)


@dataclass(frozen=True)
class Outcome(Generic[Item, Value]):
    """What became of one item: ``value``, or ``error`` where that is not None.

    ``index`` is the item's place in the input and ``seconds`` what the function took. ``peak_memory`` is the most
    resident memory that its worker had meanwhile, in bytes above what it had after importing the function.
    """

    index: int
    item: Item
    value: Value | None
    error: Exception | None
    seconds: float
    peak_memory: int


def run_in_processes(
    function: Callable[[Item], Value],
    items: Iterable[Item],
    *,
    workers: int,
    timeout: float | None,
    memory_bytes: int | None,
    ordered: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
    errors: Counter[str] | None = None,
) -> Generator[Outcome[Item, Value], None, None]:
    """Applies a function to every item in worker processes; an item that fails never stops the rest.

    Workers start when there is work for them, and die with the parent, when the returned generator is closed, or when
    an exception (Ctrl-C) leaves it. Limits are watched while the caller waits for the next outcome. A worker has a
    temporary folder (TMPDIR) of its own, which is removed with it: return contents, not paths of temporary files.

    Args:
        function: can be imported by name, as pickle demands: defined at the top of a module, or a ``partial`` of such
            a one. torch, where it imports it, computes with one thread.
        items: of any length, taken when a worker is free: those taken and not yet given back are at most ``workers``.
        workers: processes, one item in each at a time.
        timeout: seconds for one item, or None.
        memory_bytes: what a worker may take above what it has after importing the function, or None: bounds its
            private writable memory (RLIMIT_DATA) and its resident memory (looked at ten times a second). A worker that
            keeps more than half of it is replaced, so that no item pays for those before it.
        ordered: outcomes in the order of the items, where a slow item holds back those behind it; else as they finish.
        on_progress: is called with the numbers of done and of failed items after each.
        errors: is given the count of every type of error, by the type's name.

    Yields:
        One Outcome an item. Its error is what the function raised; KilledError where its worker was over a limit, ran
        out of memory, or ended (the message names the signal); VideoError with type and text where the function's own
        exception or result cannot be pickled.

    Raises:
        TypeError: the function cannot be imported by name, or an item cannot be pickled.
        ValueError: a limit that is not positive, or a function of an interactive session.
        RuntimeError: a worker could not import the function.
    """
    limits = {"workers": workers, "timeout": timeout, "memory_bytes": memory_bytes}
    for name, limit in limits.items():
        if limit is not None and not limit > 0:
            raise ValueError(f"{name}={limit} lets nothing run: use a number above 0.")
    if _STARTING in os.environ:
        raise RuntimeError(
            "a worker process that imports the main script to find the function ran into a call of run_in_processes: "
            "put that call under `if __name__ == '__main__':`, or the function into a module of its own."
        )
    setup = _setup(function, memory_bytes)
    return _outcomes(setup, iter(items), workers, timeout, memory_bytes, ordered, on_progress, errors)


def _setup(function: Callable, memory_bytes: int | None) -> bytes:
    """What a worker must know: how to import the main script if it needs it, the function and its limit."""
    try:
        pickled = pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"function={function!r} cannot be sent to another process ({error}): a worker imports it by its name, so "
            "define it with `def` at the top of a module, neither as a lambda nor inside another function."
        ) from error
    main = {}
    if b"__main__" in pickled:  # else the script is not imported again, and needs no guard
        data = multiprocessing.spawn.get_preparation_data("worker")
        main = {key: data[key] for key in ("init_main_from_name", "init_main_from_path") if key in data}
        if not main or not Path(data.get("init_main_from_path", os.sep)).exists():
            raise ValueError(
                f"function={function!r} is defined in an interactive session, which a worker cannot import: put it "
                "into a file."
            )
    return pickle.dumps((main, pickled, memory_bytes))


def _outcomes(
    setup: bytes,
    items: Iterator,
    number: int,
    timeout: float | None,
    memory_bytes: int | None,
    ordered: bool,
    on_progress: Callable[[int, int], None] | None,
    errors: Counter[str] | None,
) -> Generator[Outcome, None, None]:
    taken = given = done = failed = 0
    exhausted = False
    idle: list[_Worker] = []
    busy: list[_Worker] = []
    finished: dict[int, Outcome] = {}
    selector = selectors.DefaultSelector()
    try:
        while True:
            while not exhausted and taken - given < number:
                item = next(items, _END)
                if item is _END:
                    exhausted = True
                    break
                while idle and not idle[-1].reusable:
                    idle.pop().stop()
                busy.append(idle.pop() if idle else _Worker(setup, timeout, memory_bytes))
                try:
                    busy[-1].begin(taken, item, selector)
                except TypeError as error:  # nothing was sent: the worker is as it was
                    idle.append(busy.pop())
                    finished[taken] = Outcome(taken, item, None, error, 0.0, 0)
                    done, failed = done + 1, failed + 1
                taken += 1
            index = given if ordered else next(iter(finished), given)
            if index in finished:
                given += 1
                yield finished.pop(index)
                continue
            if not busy:
                return
            ready = {key.data for key, _ in selector.select(_WATCH_SECONDS)}
            for worker in list(busy):
                outcome = worker.advance(selector) if worker in ready else worker.judge()
                if outcome is None:
                    continue
                selector.unregister(worker.socket)
                busy.remove(worker)
                idle.append(worker)
                finished[outcome.index] = outcome
                done, failed = done + 1, failed + (outcome.error is not None)
                if errors is not None and outcome.error is not None:
                    errors[type(outcome.error).__name__] += 1
                if on_progress:
                    on_progress(done, failed)
    finally:
        for worker in idle + busy:
            worker.stop()
        selector.close()


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, setup: bytes, timeout: float | None, memory_bytes: int | None):
        self._timeout, self._memory_bytes = timeout, memory_bytes
        self._setup: bytes | None = setup  # until the worker has said that it is ready
        self._base = self._most = self._kept = 0  # resident bytes: at the start, in this item, after the last one
        with contextlib.ExitStack() as stack:
            self.socket, theirs = socket.socketpair()
            stack.enter_context(self.socket)
            stack.enter_context(theirs)
            end, life = os.pipe()
            stack.enter_context(os.fdopen(life, "wb", buffering=0))  # nobody writes: its closing kills the worker
            ending = stack.enter_context(os.fdopen(end, "rb", buffering=0))
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="worker_", ignore_cleanup_errors=True))
            code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import _serve; "
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"{code}_serve({theirs.fileno()}, {end})"],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), end),
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TMPDIR": folder, _STARTING: "1"},
            )
            theirs.close()
            ending.close()
            self.socket.setblocking(False)
            self._watched = psutil.Process(self._process.pid)
            self._resources = stack.pop_all()

    @property
    def reusable(self) -> bool:
        """Alive, and not filled by its last item."""
        full = self._memory_bytes is not None and self._kept - self._base > self._memory_bytes / 2
        return self._process.poll() is None and not full

    def begin(self, index: int, item: Any, selector: selectors.BaseSelector) -> None:
        """Starts to send an item."""
        try:
            parts = _pack(item)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(
                f"{_named(index, item)} cannot be sent to a worker process ({error}): make items of what pickle takes, "
                "such as paths."
            ) from error
        self._index, self._item, self._most = index, item, 0
        self._transfer = self._conversation(parts)
        self._moved = time.monotonic()  # when the last byte came or went
        selector.register(self.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, self)

    def _conversation(self, parts: _Parts) -> _Transfer:
        if self._setup is not None:
            yield from _send(self.socket, [memoryview(self._setup)])
            [answer] = yield from _receive(self.socket)
            failure, self._base = pickle.loads(answer)
            if failure:
                raise RuntimeError(f"a worker process could not import the function:\n{failure}")
            self._setup = None
        yield from _send(self.socket, parts)
        return (yield from _receive(self.socket))

    def advance(self, selector: selectors.BaseSelector) -> Outcome | None:
        """Goes on with sending or receiving; the outcome, when it is complete."""
        try:
            selector.modify(self.socket, next(self._transfer), self)
        except StopIteration as finished:
            return self._outcome(finished.value)
        except (EOFError, ConnectionError):
            how = self._end()
            if self._setup is not None:
                raise RuntimeError(f"a worker process {how} before it had imported the function.") from None
            return self._killed(how, "Leave it out.")
        self._moved = time.monotonic()
        return None

    def judge(self) -> Outcome | None:
        """The outcome of an item that is over a limit."""
        seconds = time.monotonic() - self._moved
        if self._setup is not None:
            if seconds > START_SECONDS:
                raise RuntimeError(f"a worker process needed more than {START_SECONDS:g} s to import the function.")
            return None
        if self._timeout is not None and seconds > self._timeout:
            return self._killed(f"took longer than timeout={self._timeout:g} s and was killed", _RAISE)
        with contextlib.suppress(psutil.NoSuchProcess):  # its end is read from the socket
            self._most = max(self._most, self._watched.memory_info().rss)
        if self._memory_bytes is not None and self._most - self._base > self._memory_bytes:
            return self._killed(f"took more than memory_bytes={self._memory_bytes} and was killed", _RAISE)
        return None

    def _outcome(self, parts: _Parts) -> Outcome:
        try:
            kind, value, seconds, self._most, self._kept = _unpack(parts)
        except _UNREADABLE as failure:
            seconds, kind = time.monotonic() - self._moved, "text"
            value = f"its result cannot be unpickled ({type(failure).__name__}: {failure})"
        if kind == "memory":
            return self._killed(
                f"ran out of memory_bytes={self._memory_bytes} ({value}) and was killed", _RAISE, seconds
            )
        if kind == "value":
            return Outcome(self._index, self._item, value, None, seconds, self._peak)
        error = value if kind == "error" else VideoError(f"{_named(self._index, self._item)}: {value}")
        return Outcome(self._index, self._item, None, error, seconds, self._peak)

    def _killed(self, how: str, fix: str, seconds: float | None = None) -> Outcome:
        self._kill()
        seconds = time.monotonic() - self._moved if seconds is None else seconds
        error = KilledError(
            f"{_named(self._index, self._item)}: the process that worked on it {how} after {seconds:.1f} s. {fix}"
        )
        return Outcome(self._index, self._item, None, error, seconds, self._peak)

    @property
    def _peak(self) -> int:
        return max(0, self._most - self._base)

    def _end(self) -> str:
        """How a process ended that has closed its socket."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self._kill()
        code = self._process.returncode
        if code == -signal.SIGKILL:
            return "was killed (SIGKILL), as by the system when memory runs out,"
        if code < 0:
            return f"crashed with {_SIGNALS.get(-code, f'signal {-code}')}"
        return f"exited with code {code}"

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # also what the function has started
        self._process.wait()

    def stop(self) -> None:
        """Ends the process and removes what belongs to it."""
        self._kill()
        self._resources.close()


def _named(index: int, item: Any) -> str:
    shown = repr(item) if isinstance(item, str | os.PathLike | int | float) else type(item).__name__
    return f"item {index} ({shown if len(shown) <= 200 else shown[:200] + '…'})"


def _serve(connection: int, life: int) -> None:
    """The life of a worker process: imports the function, then answers every item until the socket is closed."""
    fcntl.fcntl(life, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)  # when the parent's end closes, however it died
    fcntl.fcntl(life, fcntl.F_SETFL, os.O_ASYNC)
    with socket.socket(fileno=connection) as parent, contextlib.suppress(EOFError, ConnectionError):
        main, pickled, memory_bytes = pickle.loads(_blocking(_receive(parent))[0])
        try:
            multiprocessing.spawn.prepare(main)
            function = pickle.loads(pickled)
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(1)
        except (Exception, SystemExit):  # whatever the modules and the script do when imported
            _blocking(_send(parent, _pack((traceback.format_exc(), 0))))
            return
        del os.environ[_STARTING]
        gc.collect()
        limit = None if memory_bytes is None else _status("VmData") + memory_bytes
        _blocking(_send(parent, _pack((None, _status("VmRSS")))))
        while True:
            item = _blocking(_receive(parent))
            _blocking(_send(parent, _answer(function, item, limit)))


def _answer(function: Callable, item: _Parts, limit: int | None) -> _Parts:
    """The message about one item: kind, value, seconds, and the most and the last resident bytes."""
    unlimited = resource.getrlimit(resource.RLIMIT_DATA)
    with contextlib.suppress(OSError):  # not every sandbox has it; the peak is then that of all items so far
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    start = time.monotonic()

    def packed(kind: str, value: Any) -> _Parts:
        seconds = time.monotonic() - start
        return _pack((kind, value, seconds, _status("VmHWM"), _status("VmRSS")))

    try:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, unlimited[1]))
        value = function(_unpack(item))
        try:
            return packed("value", value)
        except _UNREADABLE as error:
            return packed("text", f"its result cannot be pickled ({type(error).__name__}: {error})")
    except Exception as error:  # whatever the function raises is what became of the item
        resource.setrlimit(resource.RLIMIT_DATA, unlimited)  # room to tell it
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, MemoryError) or _OUT_OF_MEMORY in text:
            return packed("memory", text)
        error.add_note("In the worker process:\n" + "".join(traceback.format_exception(error)))
        try:
            parts = packed("error", error)
            _unpack(parts)  # many exceptions can be pickled, but not be made again
        except _UNREADABLE:
            return packed("text", text)
        return parts
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, unlimited)


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: worker processes need Linux.")


# Messages: the number of parts and their sizes, then the parts. The generators serve both sides: on a socket that does
# not block they yield the event to wait for, on one that blocks they run through.


def _send(connection: socket.socket, parts: _Parts) -> _Transfer:
    sizes = struct.pack(f"<{len(parts) + 1}Q", len(parts), *map(len, parts))
    for part in [sizes, *parts]:
        rest = memoryview(part)
        while rest:
            try:
                rest = rest[connection.send(rest) :]
            except BlockingIOError:
                yield selectors.EVENT_WRITE


def _receive(connection: socket.socket) -> _Transfer:
    [number] = struct.unpack("<Q", (yield from _read(connection, 8)))
    sizes = struct.unpack(f"<{number}Q", (yield from _read(connection, 8 * number)))
    parts = []
    for size in sizes:
        parts.append((yield from _read(connection, size)))
    return parts


def _read(connection: socket.socket, size: int) -> _Transfer:
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        try:
            count = connection.recv_into(rest)
        except BlockingIOError:
            yield selectors.EVENT_READ
            continue
        if not count:
            raise EOFError
        rest = rest[count:]
    return data


def _blocking(transfer: _Transfer) -> Any:
    try:
        next(transfer)
    except StopIteration as finished:
        return finished.value
    raise RuntimeError("the socket of a worker process does not block.")


class _Pickler(pickle.Pickler):
    """Gives tensors as numpy arrays, whose bytes pickle leaves out of its stream."""

    def reducer_override(self, value: Any) -> Any:
        torch = sys.modules.get("torch")  # not imported here: there is no tensor where nobody did
        if torch is None or type(value) is not torch.Tensor or value.requires_grad or value.device.type != "cpu":
            return NotImplemented
        if value.layout is not torch.strided or value.is_quantized or value.is_conj() or value.is_neg():
            return NotImplemented
        raw = value.contiguous().reshape(-1).view(torch.uint8).numpy()
        return _tensor, (raw, str(value.dtype).removeprefix("torch."), tuple(value.shape))


def _tensor(raw: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    import torch

    return torch.from_numpy(raw).view(getattr(torch, dtype)).reshape(shape)


def _pack(value: Any) -> _Parts:
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
    return [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]


def _unpack(parts: _Parts) -> Any:
    return pickle.loads(parts[0], buffers=parts[1:])
