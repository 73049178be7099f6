"""Process pool for untrusted items: a worker is killed when it exceeds its time or memory limit, or crashes.

A worker is a fresh interpreter in a separate session, so that its whole process group can be killed. It imports the
function once and processes one item after the other, over a socket; the parent replaces it after a kill. Results are
pickles with arrays and tensors as out-of-band buffers, so that a killed worker leaves no files or shared memory.

A worker is not a sandbox: the function has the permissions of the user. Requires Linux (resource limits, /proc).
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
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil

from blueberry_video.video.errors import KilledError, VideoError
from blueberry_video.video.ranges import check_above_zero, check_at_least

Item = TypeVar("Item")
Value = TypeVar("Value")
_Parts = list[bytearray | memoryview]  # a message: a pickle, then its out-of-band buffers
_Transfer = Generator[int, None, Any]  # yields the selector event that it waits for

START_SECONDS = 300.0  # time limit for a new worker to import the function
_WATCH_SECONDS = 0.1  # interval of the time and memory checks
_STARTING = "BLUEBERRY_VIDEO_WORKER_STARTING"  # set in a worker until it has imported the function
_OUT_OF_MEMORY = "can't allocate memory"  # in torch's RuntimeError
_RAISE = "Remove the item, or raise that limit if the item is trusted."
_SIGNALS = {number.value: number.name for number in signal.Signals}
_END = object()
_UNREADABLE = (pickle.PickleError, ImportError, AttributeError, TypeError, ValueError, KeyError, IndexError, EOFError)


@dataclass(frozen=True)
class Outcome(Generic[Item, Value]):
    """Result of one item: ``value``, or ``error`` if that is not None.

    Attributes:
        index: position of the item in the input.
        item: the item.
        value: return value of the function.
        error: exception of the function or of its worker.
        seconds: run time of the function.
        peak_memory: peak resident memory of the worker in bytes, relative to that after importing the function.
    """

    index: int
    item: Item
    value: Value | None
    error: Exception | None
    seconds: float
    peak_memory: int

    def __repr__(self) -> str:
        result = f"value={type(self.value).__name__}" if self.error is None else f"error={type(self.error).__name__}"
        return f"Outcome({_named(self.index, self.item)}, {result}, {self.seconds:.3g} s)"


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
    """Applies a function to every item in worker processes; a failed item does not stop the others.

    Workers start on demand and end with the parent or the returned generator. Limits are checked while the caller waits
    for the next outcome. Each worker has a separate temporary folder (TMPDIR), which is removed with it.

    Args:
        function: a function of the top level of a module, or a ``partial`` of one. torch in it runs with one thread.
        items: any iterable, consumed when a worker is free; at most ``workers`` items are in progress.
        workers: number of processes, with one item each at a time.
        timeout: seconds per item, or None.
        memory_bytes: memory of a worker in addition to that after importing the function, or None: private writable
            memory (RLIMIT_DATA) and resident memory (checked ten times per second). A worker that retains more than
            half of it is replaced, so that the limit of an item does not depend on earlier items.
        ordered: yield outcomes in the order of the items, where a slow item delays later ones; else as they finish.
        on_progress: called with the numbers of finished and of failed items after each item.
        errors: receives the count of each error type, by type name.

    Yields:
        One Outcome per item. Its error is the exception of the function; KilledError if its worker exceeded a limit,
        ran out of memory, or ended; VideoError with type and text if the exception or the result cannot be pickled.

    Raises:
        TypeError: the function cannot be imported by name, or an item cannot be pickled.
        ValueError: a limit that is not positive, or a function of an interactive session.
        RuntimeError: a worker could not import the function.
    """
    check_at_least(1, workers=workers)
    check_above_zero(timeout=timeout, memory_bytes=memory_bytes)
    if _STARTING in os.environ:
        raise RuntimeError(
            "run_in_processes was called while a worker process imports the main script: guard the call with "
            "`if __name__ == '__main__':`, or move the function to a separate module."
        )
    start = partial(_Worker, _setup(function, memory_bytes), timeout, memory_bytes)
    return _outcomes(start, iter(items), workers, ordered, on_progress, errors)


def _setup(function: Callable, memory_bytes: int | None) -> bytes:
    """Returns the setup message of a worker: how to import the main script (if required), the function, its limit."""
    try:
        pickled = pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"function={function!r} cannot be pickled ({error}): define it with `def` at the top level of a module, "
            "since a worker imports it by name."
        ) from error
    main = {}
    if b"__main__" in pickled:  # otherwise the script is not imported and requires no guard
        data = multiprocessing.spawn.get_preparation_data("worker")
        main = {key: data[key] for key in ("init_main_from_name", "init_main_from_path") if key in data}
        if not main or not Path(data.get("init_main_from_path", os.sep)).exists():
            problem = f"function={function!r} is defined in an interactive session, which a worker cannot import"
            raise ValueError(f"{problem}: define it in a file.")
    return pickle.dumps((main, pickled, memory_bytes))


def _outcomes(
    start: Callable[[], "_Worker"],
    items: Iterator,
    number: int,
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
                busy.append(idle.pop() if idle else start())
                try:
                    busy[-1].begin(taken, item, selector)
                except TypeError as error:  # nothing was sent: the worker is unchanged
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
                outcome = worker.advance(selector) if worker in ready else worker.check_limits()
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
    """Parent side of one worker process."""

    def __init__(self, setup: bytes, timeout: float | None, memory_bytes: int | None):
        self._timeout, self._memory_bytes = timeout, memory_bytes
        self._setup: bytes | None = setup  # None once the worker is ready
        self._base = self._most = self._kept = 0  # resident bytes: at the start, in this item, after the last one
        with contextlib.ExitStack() as stack:
            self.socket, theirs = socket.socketpair()
            stack.enter_context(self.socket)
            stack.enter_context(theirs)
            end, life = os.pipe()
            stack.enter_context(os.fdopen(life, "wb", buffering=0))  # never written: closing it kills the worker
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
        """True if the worker is alive and retains at most half of its memory limit."""
        full = self._memory_bytes is not None and self._kept - self._base > self._memory_bytes / 2
        return self._process.poll() is None and not full

    def begin(self, index: int, item: Any, selector: selectors.BaseSelector) -> None:
        """Starts sending an item."""
        try:
            parts = _pack(item)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            problem = f"{_named(index, item)} cannot be pickled for a worker process ({error})"
            raise TypeError(f"{problem}: use items that pickle supports, such as paths.") from error
        self._index, self._item, self._most = index, item, 0
        self._transfer = self._conversation(parts)
        self._moved = time.monotonic()  # time of the last transfer
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
        """Continues sending or receiving; returns the outcome when it is complete."""
        try:
            selector.modify(self.socket, next(self._transfer), self)
        except StopIteration as finished:
            return self._outcome(finished.value)
        except (EOFError, ConnectionError):
            reason = self._end()
            if self._setup is not None:
                raise RuntimeError(f"a worker process {reason} before it imported the function.") from None
            return self._killed(reason, "Remove the item.")
        self._moved = time.monotonic()
        return None

    def check_limits(self) -> Outcome | None:
        """Kills a worker that exceeds a limit and returns the outcome of its item."""
        seconds = time.monotonic() - self._moved
        if self._setup is not None:
            if seconds > START_SECONDS:
                raise RuntimeError(f"a worker process took more than {START_SECONDS:g} s to import the function.")
            return None
        if self._timeout is not None and seconds > self._timeout:
            return self._killed(f"took longer than timeout={self._timeout:g} s and was killed", _RAISE)
        with contextlib.suppress(psutil.NoSuchProcess):  # the socket reports its end
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
            reason = f"ran out of memory_bytes={self._memory_bytes} ({value}) and was killed"
            return self._killed(reason, _RAISE, seconds)
        if kind == "value":
            return Outcome(self._index, self._item, value, None, seconds, self._peak)
        error = value if kind == "error" else VideoError(f"{_named(self._index, self._item)}: {value}")
        return Outcome(self._index, self._item, None, error, seconds, self._peak)

    def _killed(self, reason: str, fix: str, seconds: float | None = None) -> Outcome:
        self._kill()
        seconds = time.monotonic() - self._moved if seconds is None else seconds
        name = _named(self._index, self._item)
        error = KilledError(f"{name}: its worker process {reason} after {seconds:.1f} s. {fix}")
        return Outcome(self._index, self._item, None, error, seconds, self._peak)

    @property
    def _peak(self) -> int:
        return max(0, self._most - self._base)

    def _end(self) -> str:
        """Waits for a process that closed its socket and returns how it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self._kill()
        code = self._process.returncode
        if code == -signal.SIGKILL:
            return "was killed (SIGKILL), possibly by the system for lack of memory,"
        if code < 0:
            return f"crashed with {_SIGNALS.get(-code, f'signal {-code}')}"
        return f"exited with code {code}"

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # including processes that the function started
        self._process.wait()

    def stop(self) -> None:
        """Ends the process and removes its resources."""
        self._kill()
        self._resources.close()


def _named(index: int, item: Any) -> str:
    shown = repr(item) if isinstance(item, str | os.PathLike | int | float) else type(item).__name__
    return f"item {index} ({shown if len(shown) <= 200 else shown[:200] + '…'})"


def _serve(connection: int, life: int) -> None:
    """Main loop of a worker process: imports the function, then processes items until the socket is closed."""
    fcntl.fcntl(life, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)  # sent when the parent's end is closed, even by a crash
    fcntl.fcntl(life, fcntl.F_SETFL, os.O_ASYNC)
    with socket.socket(fileno=connection) as parent, contextlib.suppress(EOFError, ConnectionError):
        main, pickled, memory_bytes = pickle.loads(_blocking(_receive(parent))[0])
        try:
            multiprocessing.spawn.prepare(main)
            function = pickle.loads(pickled)
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(1)
        except (Exception, SystemExit):  # imports may raise anything
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
    """Processes one item; returns the message (kind, value, seconds, peak and final resident bytes)."""
    unlimited = resource.getrlimit(resource.RLIMIT_DATA)
    with contextlib.suppress(OSError):  # missing in some sandboxes; the peak is then that of all items so far
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
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
    except Exception as error:  # the outcome of the item is any exception of the function
        resource.setrlimit(resource.RLIMIT_DATA, unlimited)  # memory to report it
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, MemoryError) or _OUT_OF_MEMORY in text:
            return packed("memory", text)
        error.add_note("In the worker process:\n" + "".join(traceback.format_exception(error)))
        try:
            parts = packed("error", error)
            _unpack(parts)  # many exceptions can be pickled but not unpickled
        except _UNREADABLE:
            return packed("text", text)
        return parts
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, unlimited)


def _status(field: str) -> int:
    """Returns the bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: worker processes require Linux.")


# Messages: the number of parts and their sizes, then the parts. On a non-blocking socket the generators yield the event
# to wait for, on a blocking one they run to completion.


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
    raise RuntimeError("the socket of a worker process must be blocking.")


class _Pickler(pickle.Pickler):
    """Pickles tensors as numpy arrays, with their data as out-of-band buffers."""

    def reducer_override(self, value: Any) -> Any:
        torch = sys.modules.get("torch")  # not imported here: without torch there are no tensors
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
