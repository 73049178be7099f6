"""States of a run folder, its lock and its checkpoints, with several unequal runs, steps and sizes."""

import io
import json
import os
import pickle
import platform
import time
import warnings
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
from omegaconf import OmegaConf

from blueberry_video.experiment import checkpoint, lock, run_folder
from blueberry_video.experiment.checkpoint import AtomicCheckpointIO, Checkpoints, weights_file, why_training_ended
from blueberry_video.experiment.lock import RunLock
from blueberry_video.experiment.run_folder import RunFolder, list_runs


def config_of(**values: Any):
    return OmegaConf.create({"name": "idea", "seed": 3, "trainer": {"max_steps": 10}, "model": {"depth": 4}, **values})


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(config_of(), tmp_path)


def add_checkpoint(run: RunFolder, step: int) -> Path:
    path = run.path / "checkpoints" / f"step_{step:08d}.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": step}, path)
    return path


# ---- run folder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "ended_because", "step", "trainer", "complete"),
    [
        ({"status": "finished"}, None, 10, {"max_steps": 10}, True),
        ({"status": "finished"}, None, 12, {"max_steps": 10}, True),
        ({"status": "finished"}, None, 10, {"max_steps": 11}, False),
        ({"status": "finished"}, None, 10, {"max_steps": -1}, False),
        ({"status": "finished"}, None, 10, {"max_steps": None}, False),
        ({"status": "failed"}, None, 10, {"max_steps": 10}, False),
        ({"status": "finished"}, None, None, {"max_steps": 7}, True),  # the step of the newest checkpoint
        ({"status": "finished"}, None, None, {"max_steps": 8}, False),
        ({"status": "finished"}, "trainer.max_epochs=3 reached", 10, {"max_steps": -1, "max_epochs": 3}, True),
        ({"status": "finished"}, "trainer.max_epochs=3 reached", 10, {"max_steps": -1, "max_epochs": 4}, False),
        ({"status": "finished"}, "trainer.max_epochs=3 reached", 10, {"max_steps": -1, "max_epochs": -1}, False),
        ({"status": "finished"}, "stopped early at step 10", 10, {"max_steps": -1, "max_epochs": 3}, False),
    ],
)
def test_finished_run_without_steps_left_is_complete(tmp_path, values, ended_because, step, trainer, complete):
    config = config_of(trainer=trainer)
    run = RunFolder.create(config, tmp_path)
    for saved in (5, 7, 2):
        add_checkpoint(run, saved)
    run.update(**values, ended_because=ended_because, step=step)
    assert run.is_complete(config) is complete


def test_run_without_step_and_checkpoint_is_not_complete(run: RunFolder):
    run.update(status="finished")
    assert run.is_complete(config_of()) is False


def write_run(folder: Path, name: str, started: str | None) -> Path:
    path = folder / name
    path.mkdir()
    text = "{" if started is None else json.dumps({"status": "finished", "started": started, "metrics": {}})
    (path / "run.json").write_text(text)
    return path


def test_runs_are_ordered_by_their_start(tmp_path: Path):
    new = write_run(tmp_path, "a", "2026-01-03T00:00:00.000000+00:00")
    old = write_run(tmp_path, "b", "2026-01-01T00:00:00.000000+00:00")
    middle = write_run(tmp_path, "c", "2026-01-02T00:00:00.000000+00:00")
    (tmp_path / "sweeps").mkdir()
    assert list_runs(tmp_path) == [old, middle, new]
    assert RunFolder.open(tmp_path).path == new


def test_damaged_run_is_ordered_by_the_time_in_its_name(tmp_path: Path):
    zone = datetime(2026, 1, 2).astimezone().tzinfo
    before = write_run(tmp_path, "z", datetime(2026, 1, 2, 3, 4, 5, 999998, zone).isoformat())
    damaged = write_run(tmp_path, "2026-01-02_03-04-05_2", None)
    after = write_run(tmp_path, "a", datetime(2026, 1, 2, 3, 4, 6, 0, zone).isoformat(timespec="microseconds"))
    oldest = write_run(tmp_path, "mine", None)
    with pytest.warns(UserWarning, match="damaged") as caught:
        assert list_runs(tmp_path) == [oldest, before, damaged, after]
    assert len(caught) == 2


def test_name_of_a_run_is_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2026, 11, 5, 14, 3, 9)

    monkeypatch.setattr(run_folder, "datetime", Clock)
    names = [run_folder._make_folder(tmp_path / "idea").name for _ in range(3)]
    assert names == ["2026-11-05_14-03-09", "2026-11-05_14-03-09_2", "2026-11-05_14-03-09_3"]


def test_time_of_every_session_counts_and_the_time_between_does_not(run: RunFolder, tmp_path: Path, monkeypatch):
    now = [run.record["session_started"]]
    monkeypatch.setattr(run_folder.time, "time", lambda: now[0])
    now[0] += 40
    path = add_checkpoint(run, 5)
    run.fail(ValueError("bad"))
    assert run.record["wall_seconds"] == pytest.approx(40)
    now[0] += 1000
    resumed = RunFolder.resume("idea", "last", tmp_path)
    assert resumed.record["wall_seconds"] == pytest.approx(40)
    for file, seconds in ((path, 7), (run.path / "metrics.csv", 20), (run.path / "run.json", 3)):  # then it is killed
        file.touch()
        os.utime(file, (now[0] + seconds,) * 2)
    now[0] += 5000
    resumed = RunFolder.resume("idea", "last", tmp_path)
    assert resumed.record["wall_seconds"] == pytest.approx(60)
    now[0] += 5
    resumed.finish({})
    record = resumed.record
    assert record["wall_seconds"] == pytest.approx(65)
    assert [entry["previous_status"] for entry in record["resumes"]] == ["failed", "running"]
    ended = datetime.fromisoformat(record["ended"])
    assert timedelta(0) <= datetime.now().astimezone() - ended < timedelta(minutes=1)


def test_session_resets_the_end_and_keeps_the_rest(run: RunFolder, tmp_path: Path):
    add_checkpoint(run, 5)
    (run.path / "end_of_run.json").write_text("{}")
    (run.path / "metrics.csv").write_text("step,a\n0,1\n")
    with pytest.raises(RuntimeError), run:
        raise RuntimeError("bad")
    assert (run.record["status"], run.record["error"]) == ("failed", "RuntimeError: bad")
    resumed = RunFolder.resume("idea", run.name, tmp_path)
    record = resumed.record
    assert {key: record[key] for key in ("status", "ended", "error", "ended_because")} == {
        "status": "running",
        "ended": None,
        "error": None,
        "ended_because": None,
    }
    assert {"commit", "dirty", "time", "previous_status"} <= record["resumes"][0].keys()
    assert record["resumes"][0]["commit"] == record["commit"]
    assert (run.path / "end_of_run.json").exists()
    assert (run.path / "metrics.csv").exists()
    assert resumed.checkpoint() == run.path / "checkpoints" / "step_00000005.ckpt"


def test_files_of_a_run_without_a_checkpoint_are_removed(run: RunFolder, tmp_path: Path):
    for name in ("end_of_run.json", "metrics.csv", "notes.txt"):
        (run.path / name).write_text("x")
    RunFolder.resume("idea", "last", tmp_path)
    assert {file.name for file in run.path.iterdir() if file.is_file()} == {
        ".lock",
        "config.yaml",
        "run.json",
        "notes.txt",
    }


def test_failure_is_not_recorded_over_the_end_of_a_run(run: RunFolder):
    run.finish({"a": 1}, "the end", 10)
    with pytest.raises(RuntimeError), run:
        raise RuntimeError("in the report")
    record = run.record
    assert (record["status"], record["error"], record["step"]) == ("finished", None, 10)


def test_rank_does_not_write_the_record(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    from lightning.pytorch.utilities import rank_zero_only

    before = run.record
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    run.update(status="failed")
    run.finish({"a": 1})
    run.lock()
    assert run.record == before


# ---- lock ------------------------------------------------------------------------------------------------------------


def test_lock_names_its_process(tmp_path: Path):
    held = RunLock(tmp_path)
    owner = json.loads((tmp_path / lock.FILE).read_text())
    assert owner["pid"] == os.getpid()
    assert datetime.fromisoformat(owner["since"])
    held.release()
    held.release()
    (tmp_path / lock.FILE).write_text("x" * 500)
    RunLock(tmp_path).release()
    assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid(), "the old text is removed"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"pid": 7, "host": "h", "since": "s"}', "process 7 on h since s"),
        (b'{"pid": 7}', "another process"),
        (b"", "another process"),
        (b"[]", "another process"),
    ],
)
def test_owner_of_a_lock(content: bytes, text: str):
    assert lock._named(lock._read(io.BytesIO(content))) == text


@pytest.mark.parametrize("rank", [False, True])
def test_process_and_rank_0_lock_different_bytes(tmp_path: Path, rank: bool, monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(lock.fcntl, "lockf", lambda file, kind, length, start: calls.append((kind, length, start)))
    RunLock(tmp_path, rank)
    take, free = lock.fcntl.LOCK_EX | lock.fcntl.LOCK_NB, lock.fcntl.LOCK_UN
    assert calls == ([(take, 1, 1)] if rank else [(take, 1, 0), (take, 1, 1), (free, 1, 1)])


def test_file_system_without_locks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unsupported(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", unsupported)
    with pytest.warns(UserWarning, match=r"\.lock cannot be locked .*No locks available"):
        RunLock(tmp_path).release()


OWNER = {"pid": 7, "host": "other", "since": "2026-01-01", "start": 1, "job": None}
JOB = {"scheduler": "slurm", "cluster": "c", "id": "5", "array": None, "restart": 0}


@pytest.mark.parametrize(
    ("owner", "age", "job", "is_alive"),
    [
        (OWNER, 5, {}, True),
        (OWNER, 200, {}, False),
        ({**OWNER, "released": True}, 5, {}, False),
        ({**OWNER, "job": JOB}, 5, {"SLURM_JOB_ID": "5", "SLURM_CLUSTER_NAME": "c"}, True),
        ({**OWNER, "job": JOB}, 5, {"SLURM_JOB_ID": "5", "SLURM_CLUSTER_NAME": "c", "SLURM_RESTART_COUNT": "1"}, False),
    ],
    ids=["alive", "stale", "released", "same-start-of-the-job", "earlier-start-of-the-job"],
)
def test_owner_on_a_different_machine(tmp_path: Path, owner: dict, age: int, job: dict, is_alive: bool, monkeypatch):
    """The file system has locks only between processes of one machine."""
    for name in ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / lock.FILE
    file.write_text(json.dumps(owner))
    os.utime(file, (time.time() - age, time.time() - age))
    for use in (lock.check_unlocked, lambda folder: RunLock(folder).release()):
        if is_alive:
            with pytest.raises(BlockingIOError, match="process 7 on other since 2026-01-01"):
                use(tmp_path)
        else:
            use(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [lock.FILE]


def test_owner_without_locks_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unsupported(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", unsupported)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)
    parent = {"pid": os.getppid(), "host": platform.node(), "since": "s", "start": lock._start_time(os.getppid())}
    (tmp_path / lock.FILE).write_text(json.dumps(parent))
    with (
        pytest.warns(UserWarning, match="No locks"),
        pytest.raises(BlockingIOError, match=f"process {os.getppid()} on "),
    ):
        RunLock(tmp_path)
    (tmp_path / lock.FILE).write_text(json.dumps({**parent, "start": 1}))  # a different process had this number
    with pytest.warns(UserWarning, match="No locks"):
        RunLock(tmp_path).release()


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_size_counts_shared_memory_once_and_nested_tensors():
    base = torch.zeros(10)
    state = {"a": base, "b": [base[2:], (torch.zeros(3, dtype=torch.int64), 5)], "c": {"d": torch.zeros(7)[:2]}}
    assert checkpoint._size(state) == 40 + 24 + 28


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "Weights only load failed. Unsupported global: GLOBAL os.mkdir was not an allowed",
            "Unsupported global: GLOBAL os.mkdir",
        ),
        ("Trying to load unsupported GLOBAL posix.mkdir\nsecond", "Trying to load unsupported GLOBAL posix.mkdir"),
        ("first line\nsecond line", "first line"),
    ],
)
def test_reason_of_a_refused_file_is_one_sentence(text: str, sentence: str):
    assert checkpoint._first_sentence(pickle.UnpicklingError(text)).startswith(sentence)


@pytest.mark.parametrize("name", ["model_index.json", "config.json", "transformer/config.json"])
def test_folder_of_published_weights_is_returned(tmp_path: Path, name: str):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    assert weights_file(str(tmp_path)) == tmp_path


class Trainer(SimpleNamespace):
    """The parts of a trainer that tell how training ended."""

    def __init__(self, step: int, epochs: int = 0, max_steps: int = -1, max_epochs: int | None = None, callbacks=()):
        progress = SimpleNamespace(current=SimpleNamespace(processed=epochs))
        loop = SimpleNamespace(epoch_progress=progress)
        super().__init__(global_step=step, max_steps=max_steps, max_epochs=max_epochs, fit_loop=loop)
        self.callbacks = list(callbacks)


def stopped(reason: str | None) -> Checkpoints:
    callback = Checkpoints()
    callback.stopped = reason
    return callback


def early(message: str) -> EarlyStopping:
    callback = EarlyStopping("val/loss")
    callback.stopping_reason_message = message
    return callback


def timer(left: float | None) -> Timer:
    callback = Timer("00:00:01:00")
    callback.time_remaining = lambda stage=None: left  # type: ignore[method-assign, assignment]
    return callback


BY_CALLBACK = "a callback set trainer.should_stop"


@pytest.mark.parametrize(
    ("trainer", "text"),
    [
        (Trainer(10, 2, max_steps=10), "trainer.max_steps=10 reached"),
        (Trainer(10, 3, max_epochs=3), "trainer.max_epochs=3 reached"),
        (Trainer(9, 3, max_steps=10, max_epochs=3), "trainer.max_epochs=3 reached"),
        (Trainer(9, 2, max_steps=10, max_epochs=3), f"stopped early at step 9 of 10: {BY_CALLBACK}"),
        (Trainer(9, 2, max_epochs=-1), f"stopped early at step 9: {BY_CALLBACK}"),
        (Trainer(10, 3, 10, 3, [stopped("time")]), "stopped early at step 10 of 10: time"),
        (Trainer(4, callbacks=[timer(None), early("no gain.")]), "stopped early at step 4: EarlyStopping: no gain"),
        (Trainer(4, callbacks=[timer(0.5), stopped(None)]), f"stopped early at step 4: {BY_CALLBACK}"),
        (Trainer(4, callbacks=[early("no gain"), timer(0.0)]), "stopped early at step 4: trainer.max_time has passed"),
        (
            Trainer(4, callbacks=[early("no gain"), SimpleNamespace(stop_reason="it is NaN")]),
            "stopped early at step 4: it is NaN",
        ),
    ],
)
def test_reason_of_the_end(trainer: Trainer, text: str):
    assert why_training_ended(trainer) == text


class Pruned:
    """The parts of a trainer that pruning uses."""

    strategy = SimpleNamespace(remove_checkpoint=AtomicCheckpointIO().remove_checkpoint)

    def __init__(self, folder: Path, rank: int) -> None:
        self.default_root_dir, self.is_global_zero = folder, rank == 0


@pytest.mark.parametrize(("rank", "left"), [(0, [9, 8, 7]), (1, [9, 8, 7, 3, 1])])
def test_only_rank_0_prunes_to_the_newest(run: RunFolder, rank: int, left: list[int]):
    files = {step: add_checkpoint(run, step) for step in (3, 9, 1, 8, 7)}
    temporary = run.path / "checkpoints" / ".step_00000002.ckpt.tmp"
    temporary.touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Checkpoints(keep=3)._prune(Pruned(run.path, rank))
    assert checkpoint.checkpoint_files(run.path / "checkpoints") == [files[step] for step in left]
    assert temporary.exists() == (rank == 1)


def test_verified_checkpoint_is_hashed_again_only_after_a_change(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    file = add_checkpoint(run, 3)
    hashed = []
    monkeypatch.setattr(checkpoint, "checkpoint_fault", lambda path: hashed.append(path))
    callback = Checkpoints()
    assert not callback._is_damaged(file)
    assert not callback._is_damaged(file)
    assert hashed == [file]
    os.utime(file, (1, 1))
    callback._is_damaged(file)
    assert hashed == [file, file]
    monkeypatch.setattr(checkpoint, "checkpoint_fault", lambda path: "bad")
    os.utime(file, (2, 2))
    assert callback._is_damaged(file)
    assert callback._is_damaged(file)


class Stepping(SimpleNamespace):
    """The parts of a trainer that decide whether a checkpoint is due."""

    def __init__(self, step: int, **changes: Any) -> None:
        defaults: dict[str, Any] = {"max_steps": 100, "max_epochs": 9, "current_epoch": 2, "is_last_batch": False}
        defaults |= {"should_stop": False, "can_stop": True}
        values = defaults | changes
        loop = SimpleNamespace(_can_stop_early=values.pop("can_stop"))
        super().__init__(global_step=step, fit_loop=loop, **values)


@pytest.mark.parametrize(
    ("trainer", "due"),
    [
        (Stepping(7), True),
        (Stepping(14), True),
        (Stepping(8), False),
        (Stepping(21), False),  # saved before: this batch only accumulated gradients
        (Stepping(100), True),
        (Stepping(99), False),
        (Stepping(20, should_stop=True), True),
        (Stepping(20, should_stop=True, can_stop=False), False),
        (Stepping(20, current_epoch=8, is_last_batch=True), True),
        (Stepping(20, current_epoch=8), False),
        (Stepping(20, current_epoch=7, is_last_batch=True), False),
        (Stepping(20, current_epoch=-2, max_epochs=-1, is_last_batch=True), False),
        (Stepping(20, max_epochs=None, is_last_batch=True), False),
    ],
)
def test_steps_at_which_a_checkpoint_is_due(trainer: Any, due: bool):
    callback = Checkpoints(every_n_steps=7)
    callback._saved_step = 21
    assert callback._is_due(trainer) is due


@pytest.mark.parametrize(
    ("statuses", "finished"), [(None, False), ([], False), (["finished"], True), (["finished", "failed"], False)]
)
def test_run_that_was_finished_when_it_was_resumed(tmp_path: Path, statuses: list[str] | None, finished: bool):
    if statuses is not None:
        resumes = [{"previous_status": status} for status in statuses]
        record = {"status": "running", "started": "", "metrics": {}, "resumes": resumes}
        (tmp_path / "run.json").write_text(json.dumps(record))
    assert checkpoint._was_finished(tmp_path) is finished
