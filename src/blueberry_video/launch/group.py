"""Processes of a run that ``torchrun`` or ``srun`` started: rank 0 leads, the others follow.

Rank 0 reads the command line, creates or resumes the run folder, and for each run, one or every point of a sweep, sends
config and folder to the other ranks, which only train. They communicate over the store of ``torch.distributed``, in
which each rank also counts up a number once a second, so that a lost rank ends the others:

- a rank that fails sends its error to rank 0, which raises the one that came first;
- a rank that ended without an error, or that a signal has stopped for ``STOPPED_SECONDS``, is noticed by rank 0, and
  rank 0 by the others;
- a rank that is still waiting for a lost one ``SETTLE_SECONDS`` later, as in NCCL, ends at once.

A signal that one rank receives is sent to all of them.
"""

import importlib
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from blueberry_video.launch import environment, signals
from blueberry_video.launch.environment import Environment
from blueberry_video.launch.failures import Failure, LostRankError, first_cause, has_ended, is_stopped

JOIN_SECONDS = 300.0  # between the start of the first and the last rank
BEAT_SECONDS = 1.0
GONE_SECONDS = 4.0  # after the end of a process on this machine, for its last messages
STOPPED_SECONDS = 30.0
LOST_SECONDS = 40.0  # without a sign of life of a rank on a different machine, or of the store
SETTLE_SECONDS = 8.0  # after the first failure, for the other ranks to report theirs
LEAVE_SECONDS = 15.0  # for the other ranks to read the end of the command
POLL_SECONDS = 0.1

_group: "Group | None" = None


@contextmanager
def shared(config: DictConfig, folder: Path, resumed: bool, fail: Callable[[BaseException], None]) -> Iterator[None]:
    """Context manager of a run in rank 0 of a group, see :meth:`Group.shared`; does nothing without a group.

    Args:
        config: resolved config.
        folder: run folder.
        resumed: whether the run is resumed.
        fail: called with the error if this process must end while its main thread waits for a lost rank.
    """
    if _group is None:
        yield
        return
    _group.on_end = fail
    message = {"config": OmegaConf.to_container(config, resolve=True), "folder": str(folder), "resumed": resumed}
    with _group.shared(message):
        yield


@contextmanager
def joined() -> Iterator["Group | None"]:
    """Context manager in which this process is a member of its :class:`Group`, if it has one.

    At the end, rank 0 tells the other ranks its exit code, which is theirs too.
    """
    global _group
    here = environment.recognize()
    if not here.is_external or here.world_size == 1:
        yield None
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // here.local_world_size)))
    _group = group = Group(here)
    code = 1
    try:
        yield group
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    finally:
        _group = None
        group.leave(code)


class Group:
    """The processes of a run, seen from one of them.

    Args:
        here: the environment of this process.
    """

    def __init__(self, here: Environment) -> None:
        self.here = here
        self._run = 0  # number of the current run; 0 before the first
        self._has_failed = False  # the previous run
        self._leaves = False
        self._in_run = False
        self._since = 0.0  # time when a failure was noticed that the main thread must handle
        self._failure: Failure | None = None  # of a lost rank
        self._closed = threading.Event()
        self._contact = time.monotonic()
        self._beats: dict[int, tuple[int, float]] = {}  # rank -> number and the time when it changed
        self._processes: dict[int, dict[str, Any]] = {}  # rank -> host and process
        self._gone: dict[int, float] = {}
        self._stopped: dict[int, float] = {}
        self._prefix = f"blueberry/{here.key}"
        self._store = self._connect(here.hosts_store and here.rank == 0)
        # Libraries then see what torchrun sets, and torch.distributed connects to this store.
        os.environ.update({**here.variables(), "TORCHELASTIC_USE_AGENT_STORE": "True"})
        os.environ.setdefault("TORCHELASTIC_RUN_ID", "none")
        os.environ.setdefault("TORCHELASTIC_RESTART_COUNT", "0")
        self._separate_process_groups()
        self._set(f"process/{here.rank}", {"host": platform.node(), "process": os.getpid()})
        end = time.monotonic() + JOIN_SECONDS
        while (leader := self._get("process/0")) is None and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        self._processes[0] = leader or {}
        self._beats[0] = 0, time.monotonic()
        threading.Thread(target=self._beat, args=(self._connect(),), daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def follows(self) -> bool:
        return self.here.rank > 0

    @contextmanager
    def shared(self, message: Mapping[str, Any]) -> Iterator[None]:
        """Context manager of a run in rank 0, which the other ranks start with ``message``, and end before it ends.

        Raises:
            LostRankError: if a different rank failed first.
        """
        if self._failure is not None:
            raise LostRankError(f"{self._failure.named()} No further run can start in this group of processes.")
        with self._running(self._has_failed):
            self._set(f"run/{self._run}", {**message, "reconnect": self._has_failed})
            self._has_failed = True
            try:
                yield
            except signals.Interrupted:
                raise
            except (Exception, SystemExit) as error:
                own = Failure.of(error, 0)
                _leave_process_group()
                self._set(f"ended/{self._run}/0", own._asdict())
                try:
                    failures = self._failures()
                except signals.Interrupted:  # of torchrun, because a rank has failed
                    failures = self._failures()
                cause = first_cause([own, *failures])
                if cause.rank == 0 or cause.error == own.error:
                    raise
                raise self._lost(cause, message) from error
            failures = self._failures(wait=True)
            if failures:
                raise self._lost(first_cause(failures), message)
            self._has_failed = False

    def follow(self, train: Callable[[dict[str, Any]], None]) -> None:
        """Trains every run that rank 0 starts, until rank 0 ends.

        Args:
            train: called with the message of :meth:`shared`.

        Raises:
            SystemExit: with the exit code of rank 0.
        """
        while (message := self._next()) is not None:
            with self._running(message["reconnect"]):
                ended: dict[str, Any] = {}
                try:
                    train(message)
                except signals.Interrupted:
                    ended = {"interrupted": True}
                    _leave_process_group()
                except (Exception, SystemExit) as error:
                    ended = Failure.of(error, self.here.rank)._asdict()
                    _leave_process_group()
                self._set(f"ended/{self._run}/{self.here.rank}", ended)
            if ended.get("interrupted"):
                break
        code = self._wait_for(lambda: self._get("end"))
        raise SystemExit(code)

    def leave(self, code: int) -> None:
        """Ends the membership; rank 0 tells the others its exit code, and waits until they have read it."""
        self._leaves = True
        try:
            if self.here.rank == 0:
                self._set("end", code)
                others = [f"left/{rank}" for rank in range(1, self.here.world_size)]
                end = time.monotonic() + (LEAVE_SECONDS if self.here.hosts_store else 0.0)
                while time.monotonic() < end and any(self._get(name) is None for name in others if self._is_here(name)):
                    time.sleep(POLL_SECONDS)
            else:
                leader = self._get("process/0") or {}
                self._set(f"left/{self.here.rank}", code)
                end = time.monotonic() + GONE_SECONDS  # torchrun ends all ranks as soon as one has failed
                while code and leader.get("host") == platform.node() and time.monotonic() < end:
                    if has_ended(leader["process"]):
                        break
                    time.sleep(POLL_SECONDS)
        finally:
            self._closed.set()

    @contextmanager
    def _running(self, reconnect: bool) -> Iterator[None]:
        if reconnect:
            _leave_process_group()
        self._run, self._in_run = self._run + 1, True
        try:
            yield
        finally:
            self._in_run, self._since = False, 0.0

    def _separate_process_groups(self) -> None:
        """Gives the process groups of the runs different keys in the store, which keeps those of earlier runs."""
        from torch.distributed import PrefixStore

        handlers = importlib.import_module("torch.distributed.rendezvous")._rendezvous_handlers
        connect = handlers["env"]

        def connect_run(*arguments: Any, **options: Any) -> Iterator[tuple[Any, int, int]]:
            for store, rank, size in connect(*arguments, **options):
                yield PrefixStore(f"{self._prefix}/group/{self._run}", store), rank, size

        handlers["env"] = connect_run

    def _lost(self, cause: Failure, message: Mapping[str, Any]) -> LostRankError:
        if cause.text:
            print(cause.text, file=sys.stderr, flush=True)
        return LostRankError(
            f"rank {cause.rank} of the {self.here.world_size} processes of the run {message['folder']} failed first: "
            f"{cause.error}"
        )

    def _failures(self, wait: bool = False) -> list[Failure]:
        """Returns the failures of the other ranks, those that are lost last.

        Args:
            wait: wait until all ranks have ended the run, not only ``SETTLE_SECONDS``.
        """
        failures: dict[int, Failure] = {}
        ended: set[int] = set()
        end = time.monotonic() + SETTLE_SECONDS
        while len(ended) < self.here.world_size - 1 and (wait or time.monotonic() < end):
            for rank in range(1, self.here.world_size):
                if rank in ended or (state := self._get(f"ended/{self._run}/{rank}")) is None:
                    continue
                ended.add(rank)
                if "error" in state:
                    failures[rank] = Failure(**state)
            if (failures or self._failure) and wait:
                wait, end = False, time.monotonic() + SETTLE_SECONDS
            if self._failure and self._failure.rank not in ended:
                ended.add(self._failure.rank)
                failures[self._failure.rank] = self._failure
            time.sleep(POLL_SECONDS)
        return list(failures.values())

    def _next(self) -> dict[str, Any] | None:
        """Waits for the next run; returns None if there is none."""
        name = f"run/{self._run + 1}"
        found = self._wait_for(lambda: self._get(name) or ({} if self._get("end") is not None else None))
        return found or None

    def _wait_for(self, read: Callable[[], Any]) -> Any:
        while (value := read()) is None:
            if self._failure is not None:
                self._end(self._failure)
            time.sleep(POLL_SECONDS)
        return value

    def _connect(self, hosts: bool = False) -> Any:
        from torch.distributed import TCPStore

        return TCPStore(
            self.here.address,
            self.here.port,
            is_master=hosts,
            wait_for_workers=False,
            timeout=timedelta(seconds=JOIN_SECONDS),
            multi_tenant=True,
        )

    def _set(self, name: str, value: Any) -> None:
        try:
            self._store.set(f"{self._prefix}/{name}", json.dumps(value))
        except RuntimeError:
            self._without_store()

    def _get(self, name: str, store: Any = None) -> Any:
        name = f"{self._prefix}/{name}"
        try:
            return json.loads((store or self._store).get(name)) if (store or self._store).check([name]) else None
        except RuntimeError:
            if store is not None:
                raise
            return self._without_store()

    def _without_store(self) -> None:
        """Ends this process after the store was closed, by the end of rank 0 or of torchrun."""
        if not self._leaves:
            self._end(self._failure or _noticed(0, "its process has ended, and with it the store."))

    def _is_here(self, name: str) -> bool:
        rank = int(name.rpartition("/")[2])
        return self._failure is None or self._failure.rank != rank

    def _beat(self, store: Any) -> None:
        """Thread: counts up the number of this rank, and reads those of the ranks that it watches, and signals."""
        watched = range(1, self.here.world_size) if self.here.rank == 0 else [0]
        sent = False
        while not self._closed.wait(BEAT_SECONDS):
            try:
                store.add(f"{self._prefix}/beat/{self.here.rank}", 1)
                now = time.monotonic()
                for rank in watched:
                    number = store.add(f"{self._prefix}/beat/{rank}", 0)
                    if rank not in self._beats or self._beats[rank][0] != number:
                        self._beats[rank] = number, now
                    if rank not in self._processes and (process := self._get(f"process/{rank}", store)):
                        self._processes[rank] = process
                    if rank in self._gone and self._get(f"left/{rank}" if rank else "end", store) is not None:
                        del self._gone[rank]
                received = signals.received()
                if received is not None and not sent:
                    sent = True
                    store.set(f"{self._prefix}/signal", json.dumps(int(received)))
                elif received is None and (number := self._get("signal", store)) is not None:
                    os.kill(os.getpid(), number)
                if self._in_run and not self._since and self._others_failed(store):
                    self._since = time.monotonic()
                self._contact = time.monotonic()
            except RuntimeError:  # the store has ended
                if not self._closed.wait(GONE_SECONDS):
                    self._lose(self._failure or _noticed(0, "its process has ended, and with it the store."))
                return

    def _others_failed(self, store: Any) -> bool:
        if self.here.rank > 0:
            return self._get(f"ended/{self._run}/0", store) is not None or self._get("end", store) is not None
        states = (self._get(f"ended/{self._run}/{rank}", store) for rank in range(1, self.here.world_size))
        return any(state and ("error" in state or "interrupted" in state) for state in states)

    def _watch(self) -> None:
        """Thread: notices lost ranks, and ends this process if its main thread waits for one."""
        started = last = time.monotonic()
        while not self._closed.wait(0.5):
            now = time.monotonic()
            if now - last > 5:  # this process was stopped or had no processor: others may be alive
                started = started + now - last
                self._contact = now
                self._beats = {rank: (number, now) for rank, (number, _) in self._beats.items()}
            last = now
            if self._failure is None and (lost := self._lost_rank(now, started)) is not None:
                self._lose(lost)
            if self._since and now - self._since > SETTLE_SECONDS + 2:  # the main thread waits in a collective
                self._end(self._failure or Failure(self.here.rank, 0.0, ""))

    def _lost_rank(self, now: float, started: float) -> Failure | None:
        if now - self._contact > LOST_SECONDS:
            return _noticed(0, "its store does not answer.")
        for rank, (_, changed) in self._beats.copy().items():
            if rank == self.here.rank:
                continue
            process = self._processes.get(rank, {})
            if process.get("host") == platform.node() and (identifier := process["process"]):
                where = f"process {identifier} on {process['host']}"
                stopped = is_stopped(identifier)
                since = self._stopped[rank] = self._stopped.get(rank, now) if stopped else now
                if now - since >= STOPPED_SECONDS:
                    # before its end: the other thread reports the end of its store otherwise
                    self._failure = _noticed(rank, f"{where} was stopped by a signal for {STOPPED_SECONDS:.0f} s.")
                    os.kill(identifier, signal.SIGKILL)
                    return self._failure
                if has_ended(identifier):
                    if now - self._gone.setdefault(rank, now) >= GONE_SECONDS:
                        return _noticed(rank, f"{where} ended without an error: it was killed.")
                    continue
            limit = LOST_SECONDS if process else JOIN_SECONDS
            if now - max(changed, started) > limit:
                what = "gives no sign of life" if process else "has not started"
                host = f" on {process['host']}" if process else ""
                return _noticed(rank, f"its process{host} {what} for {limit:.0f} s.")
        return None

    def _lose(self, failure: Failure) -> None:
        self._failure = failure
        self._since = self._since or time.monotonic()

    def _end(self, failure: Failure) -> None:
        """Ends this process while its main thread waits for a lost rank. One rank prints the reason."""
        code = 1
        try:
            # the store may be that of rank 0, which does not answer
            number = None if failure.rank == 0 and failure.error else self._get("signal")
            if number is not None:
                code = int(str(signals.Interrupted(number).code))
            if self.here.rank == 0:
                causes = [*self._known_failures(), *([failure] if failure.error else [])]
                if causes:
                    error = LostRankError(first_cause(causes).named())
                    print(f"\nError: {error} The run ends.", file=sys.stderr, flush=True)
                if self.on_end is not None:
                    self.on_end(error if causes else signals.Interrupted(number or signal.SIGTERM))
                self._set("end", code)
                time.sleep(2 * BEAT_SECONDS)  # for the other ranks to read it
            elif self.here.rank == 1 and failure.rank == 0 and failure.error:
                print(f"\nError: {failure.named()} The run ends.", file=sys.stderr, flush=True)
        finally:
            os._exit(code)

    on_end: Callable[[BaseException], None] | None = None
    """Called with the error before this process ends without its main thread."""

    def _known_failures(self) -> list[Failure]:
        if self.here.rank:
            return []
        states = [self._get(f"ended/{self._run}/{rank}") for rank in range(1, self.here.world_size)]
        return [Failure(**state) for state in states if state and "error" in state]


def _noticed(rank: int, error: str) -> Failure:
    return Failure(rank, time.time(), error, reported=False)


def _leave_process_group() -> None:
    """Closes the connections to the other ranks; operations that wait for this rank then fail."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
