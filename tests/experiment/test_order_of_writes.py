"""Order of writes: what a kill or a power failure between any two of them leaves on disk."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from blueberry_video import atomic
from blueberry_video.experiment import checkpoint, record
from blueberry_video.experiment.checkpoint import AtomicCheckpointIO, checkpoint_fault, latest_good_checkpoint
from blueberry_video.experiment.metrics_table import MetricsTable
from blueberry_video.experiment.run_folder import RunFolder


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Returns the list of writes: ("sync", file), ("hash", file) and ("rename", destination)."""
    found: list[tuple[str, str]] = []
    fsync, replace, digest = os.fsync, Path.replace, checkpoint._sha256

    def name(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    monkeypatch.setattr(os, "fsync", lambda file: found.append(("sync", name(file))) or fsync(file))
    monkeypatch.setattr(Path, "replace", lambda self, to: found.append(("rename", to.name)) or replace(self, to))
    monkeypatch.setattr(checkpoint, "_sha256", lambda path: found.append(("hash", path.name)) or digest(path))
    return found


def save(folder: Path, step: int, value: float) -> Path:
    path = folder / f"step_{step:08d}.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.full((1000,), value)}, path)
    return path


def test_checkpoint_is_on_disk_before_its_digest_and_its_digest_before_its_name(tmp_path: Path, writes):
    path = save(tmp_path / "checkpoints", 3, 1.0)
    digest = f"{path.name}.sha256"
    assert writes == [
        ("sync", f".{path.name}.tmp"),
        ("hash", f".{path.name}.tmp"),
        ("sync", f".{digest}.tmp"),
        ("rename", digest),
        ("sync", "checkpoints"),
        ("sync", f".{path.name}.tmp"),
        ("rename", path.name),
        ("sync", "checkpoints"),
    ]


@pytest.mark.parametrize("killed_at", ["step_00000002.ckpt.sha256", "step_00000002.ckpt"])
@pytest.mark.parametrize("exists", [False, True])
def test_kill_before_a_rename_never_validates_wrong_contents(tmp_path: Path, killed_at: str, exists: bool, monkeypatch):
    first = save(tmp_path, 1, 1.0)
    if exists:
        save(tmp_path, 2, 2.0)
    replace = Path.replace

    def kill(self: Path, to: Path) -> Path:
        if to.name == killed_at:
            raise KeyboardInterrupt
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, 3.0)
    monkeypatch.undo()
    second = tmp_path / "step_00000002.ckpt"
    if exists and killed_at.endswith(".sha256"):
        assert AtomicCheckpointIO().load_checkpoint(second)["weights"][0] == 2.0
    elif exists:
        assert "do not match" in str(checkpoint_fault(second))
        with pytest.warns(UserWarning, match=second.name):
            assert latest_good_checkpoint(tmp_path) == first
    else:
        assert latest_good_checkpoint(tmp_path) == first


def test_digest_is_that_of_the_whole_file(tmp_path: Path):
    """The file is hashed after it is flushed: more than a buffer, and not a multiple of one."""
    path = tmp_path / "step_00000001.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.rand(1_000_003)}, path)
    assert checkpoint_fault(path) is None
    assert (tmp_path / f"{path.name}.sha256").read_text() == f"{checkpoint._sha256(path)}\n"


def test_text_is_on_disk_before_its_name(tmp_path: Path, writes):
    atomic.write_text(tmp_path / "a.txt", "text")
    assert writes == [("sync", ".a.txt.tmp"), ("rename", "a.txt"), ("sync", tmp_path.name)]
    writes.clear()
    with atomic.atomic_file(tmp_path / "a.txt", sync_folder=False) as file:
        file.write(b"new")
    assert writes == [("sync", ".a.txt.tmp"), ("rename", "a.txt")]


def test_new_run_writes_its_config_before_its_record(tmp_path: Path, writes):
    run = RunFolder.create(OmegaConf.create({"name": "idea"}), tmp_path)
    assert [name for kind, name in writes if kind == "rename"] == ["config.yaml", "run.json"]
    run.finish({"val/loss": 1.0})


def test_new_column_replaces_the_table_and_a_known_one_is_written_in_place(tmp_path: Path, writes):
    table = MetricsTable(tmp_path / "metrics.csv")
    table.write({"a": 1}, 0)
    assert ("rename", "metrics.csv") in writes
    writes.clear()
    table.write({"a": 2}, 1)
    table.write({"a": 22}, 1)
    assert writes == []
    table.write({"b": 3}, 1)
    assert ("rename", "metrics.csv") in writes
    assert (tmp_path / "metrics.csv").read_text() == "step,a,b\n0,1,\n1,22,3\n"


@pytest.mark.parametrize(("code", "fits"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.ENOSPC, False)])
def test_full_disk_writes_the_record_in_place_if_it_fits(tmp_path: Path, code: int, fits: bool, monkeypatch):
    run = RunFolder.create(OmegaConf.create({"name": "idea"}), tmp_path)
    before = (run.path / "run.json").read_text()
    blocks = (run.path / "run.json").stat().st_blocks * 512
    assert blocks >= len(before)

    def full(path: Path, text: str) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(record, "write_text", full)
    if fits:
        run.update(hardware={}, versions={})  # shorter: the rest of the old text is cut off
        assert json.loads((run.path / "run.json").read_text()) == run.record
        assert len((run.path / "run.json").read_text()) < len(before)
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            run.update(error="x" * (blocks + 1))
        assert (run.path / "run.json").read_text() == before


def test_other_errors_of_the_disk_are_raised(tmp_path: Path, monkeypatch):
    run = RunFolder.create(OmegaConf.create({"name": "idea"}), tmp_path)

    def refuse(path: Path, text: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(record, "write_text", refuse)
    before = run.record
    with pytest.raises(PermissionError):
        run.update(error="x")
    assert run.record == before
    (run.path / "run.json").unlink()

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        record.write_record(run.path, before)
