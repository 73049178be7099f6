from pathlib import Path

import pytest
import torch

from blueberry_video.experiment.checkpoint import (
    AtomicCheckpointIO,
    Checkpoints,
    checkpoint_fault,
    checkpoint_files,
    latest_good_checkpoint,
    weights_file,
)


def save(folder: Path, step: int) -> Path:
    path = folder / f"step_{step:08d}.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.full((1000,), float(step))}, path)
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose_the_checksum(path: Path) -> None:
    path.with_name(f"{path.name}.sha256").unlink()


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path / "new" / "folder", 3)
    assert checkpoint_fault(path) is None
    assert AtomicCheckpointIO().load_checkpoint(path)["weights"].tolist() == [3.0] * 1000
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.name}.sha256"]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_the_checksum])
def test_damaged_file_is_recognised_and_the_one_before_taken(tmp_path: Path, damage) -> None:
    before, newest = save(tmp_path, 9), save(tmp_path, 10)
    damage(newest)
    with pytest.raises(ValueError, match=f"{newest.name} cannot be used"):
        AtomicCheckpointIO().load_checkpoint(newest)
    with pytest.warns(UserWarning, match=f"{before.name}: {newest.name}: its "):
        assert latest_good_checkpoint(tmp_path) == before


def test_newest_good_one_is_taken_silently(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    save(tmp_path, 9)
    newest = save(tmp_path, 10)
    assert latest_good_checkpoint(tmp_path) == newest
    assert not recwarn.list


def test_nothing_good_is_an_error_that_tells_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no step_\*\.ckpt"):
        latest_good_checkpoint(tmp_path)
    truncate(save(tmp_path, 1))
    lose_the_checksum(save(tmp_path, 2))
    with pytest.raises(
        FileNotFoundError, match=r"step_00000002\.ckpt: its checksum.*step_00000001\.ckpt: its contents"
    ):
        latest_good_checkpoint(tmp_path)


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 1)

    def disk_full(checkpoint: object, file) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="no space"):
        AtomicCheckpointIO().save_checkpoint({}, path)
    assert checkpoint_fault(path) is None


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "step_1.ckpt")


def test_removal_takes_the_checksum_along(tmp_path: Path) -> None:
    AtomicCheckpointIO().remove_checkpoint(save(tmp_path, 1))
    assert list(tmp_path.iterdir()) == []


def test_newest_first(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in (9, 10, 2)]
    assert checkpoint_files(tmp_path) == [paths[1], paths[0], paths[2]]


@pytest.mark.parametrize("arguments", [{"every_n_steps": 0}, {"keep": 0}])
def test_senseless_numbers_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Checkpoints(**arguments)


def test_what_a_run_starts_from_is_a_file_or_the_newest_checkpoint_of_a_run(tmp_path: Path):
    save(tmp_path / "checkpoints", 1)
    newest = save(tmp_path / "checkpoints", 2)
    assert weights_file(tmp_path) == newest
    assert weights_file(newest) == newest
    with pytest.raises(FileNotFoundError, match=r"init_from=.*nothing: there is no such file or run folder"):
        weights_file(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds neither a run .* nor published weights"):
        weights_file(tmp_path / "empty")
