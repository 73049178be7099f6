import os
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

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


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path / "new" / "folder", 3)
    assert checkpoint_fault(path) is None
    assert AtomicCheckpointIO().load_checkpoint(path)["weights"].tolist() == [3.0] * 1000
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.name}.sha256"]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_the_checksum])
def test_damaged_file_raises_and_the_previous_one_is_used(tmp_path: Path, damage) -> None:
    before, newest = save(tmp_path, 9), save(tmp_path, 10)
    damage(newest)
    with pytest.raises(ValueError, match=f"{newest.name} .*resume=last"):
        AtomicCheckpointIO().load_checkpoint(newest)
    with pytest.warns(UserWarning, match=f"{before.name}: {newest.name}: "):
        assert latest_good_checkpoint(tmp_path) == before


def test_newest_valid_checkpoint_is_used_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    save(tmp_path, 9)
    newest = save(tmp_path, 10)
    assert latest_good_checkpoint(tmp_path) == newest
    assert not recwarn.list


def test_no_valid_checkpoint_raises_with_the_fault_of_each(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no step_\*\.ckpt"):
        latest_good_checkpoint(tmp_path)
    truncate(save(tmp_path, 1))
    lose_the_checksum(save(tmp_path, 2))
    with pytest.raises(FileNotFoundError, match=r"00002\.ckpt: .*checksum.* missing; .*00001\.ckpt: .*contents"):
        latest_good_checkpoint(tmp_path)


def test_binary_checksum_is_damage(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    path.with_name(f"{path.name}.sha256").write_bytes(b"\xff\x00")
    assert "checksum" in checkpoint_fault(path)


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    good = save(tmp_path, 100)
    for name in ("step_last.ckpt", "step_.ckpt", "step_00000200 (copy).ckpt", "step_²00.ckpt"):
        (tmp_path / name).write_bytes(b"?")
    assert checkpoint_files(tmp_path) == [good]
    assert latest_good_checkpoint(tmp_path) == good


class Prune:
    """The parts of a trainer that pruning uses."""

    is_global_zero = True
    strategy = SimpleNamespace(remove_checkpoint=AtomicCheckpointIO().remove_checkpoint)

    def __init__(self, folder: Path) -> None:
        self.default_root_dir = folder


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_the_checksum])
def test_pruning_removes_damaged_checkpoints_before_valid_ones(tmp_path: Path, damage) -> None:
    folder = tmp_path / "checkpoints"
    callback, trainer = Checkpoints(keep=2), Prune(tmp_path)
    first, second = save(folder, 10), save(folder, 20)
    callback._prune(trainer)
    damage(second)
    third = save(folder, 15)  # resumed from the first
    with pytest.warns(UserWarning, match=rf"{second.name}\b"):
        callback._prune(trainer)
    assert checkpoint_files(folder) == [third, first]
    callback._prune(trainer)
    fourth = save(folder, 18)
    callback._prune(trainer)
    assert checkpoint_files(folder) == [fourth, third]


class Foreign:
    """An object that only unrestricted unpickling builds."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("created_by_a_checkpoint",)


@pytest.mark.parametrize("weights_only", [None, False, True])
def test_checkpoint_with_code_is_not_executed(tmp_path: Path, weights_only: bool | None, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step_00000001.ckpt"
    AtomicCheckpointIO().save_checkpoint({"callbacks": {"x": Foreign()}}, path)
    with pytest.raises(ValueError, match=rf"{path.name} .*mkdir.*init_from"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=weights_only)
    assert not Path("created_by_a_checkpoint").exists()


def test_configs_numpy_scalars_and_paths_are_saved_as_plain_values(tmp_path: Path) -> None:
    state = {
        "optimizer_states": [{"param_groups": [{"betas": OmegaConf.create([0.9, 0.95]), "lr": np.float64(0.5)}]}],
        "options": (OmegaConf.create({"a": {"b": 1}}), Path("a/b"), np.int64(3)),
        "weights": OrderedDict(a=torch.ones(2)),
    }
    path = tmp_path / "step_00000001.ckpt"
    AtomicCheckpointIO().save_checkpoint(state, path)
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert loaded["optimizer_states"] == [{"param_groups": [{"betas": [0.9, 0.95], "lr": 0.5}]}]
    assert loaded["options"] == ({"a": {"b": 1}}, "a/b", 3)
    assert loaded["weights"]["a"].tolist() == [1, 1]


def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 1)

    def disk_full(checkpoint: object, file) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="no space"):
        AtomicCheckpointIO().save_checkpoint({}, path)
    assert checkpoint_fault(path) is None
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, f"{path.name}.sha256"]


def test_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"step_1\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "step_1.ckpt")


def test_removal_includes_the_checksum(tmp_path: Path) -> None:
    AtomicCheckpointIO().remove_checkpoint(save(tmp_path, 1))
    assert list(tmp_path.iterdir()) == []


def test_files_are_listed_newest_first(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in (9, 10, 2)]
    assert checkpoint_files(tmp_path) == [paths[1], paths[0], paths[2]]


@pytest.mark.parametrize("arguments", [{"every_n_steps": 0}, {"keep": 0}])
def test_arguments_below_1_raise(arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}=0"):
        Checkpoints(**arguments)


def test_init_from_is_a_file_or_the_newest_checkpoint_of_a_run(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 1)
    newest = save(tmp_path / "checkpoints", 2)
    assert weights_file(tmp_path) == newest
    assert weights_file(newest) == newest
    with pytest.raises(FileNotFoundError, match=r"init_from=\S*/nothing .*outputs/"):
        weights_file(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"init_from=\S*/empty .*checkpoints/.*config\.json"):
        weights_file(tmp_path / "empty")


def test_full_disk_names_size_and_space(tmp_path: Path) -> None:
    """Writes more than a limit on the size of files allows, which fails like a full disk."""
    code = (
        "import errno, resource, signal, sys, torch; from pathlib import Path\n"
        "from blueberry_video.experiment.checkpoint import AtomicCheckpointIO\n"
        "import blueberry_video.atomic as atomic; errno.ENOSPC = errno.EFBIG\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))\n"
        "AtomicCheckpointIO().save_checkpoint({'a': torch.zeros(100000)}, Path(sys.argv[1]) / 'step_00000001.ckpt')"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert re.search(
        r"OSError: File too large: .*step_00000001\.ckpt needs 400000 bytes, and \d+ bytes are free in", result.stderr
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "cause"), [(b"", "empty"), (b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "`git lfs pull`")]
)
def test_empty_file_and_git_lfs_pointer_are_named(tmp_path: Path, content: bytes, cause: str) -> None:
    (tmp_path / "step_00000001.ckpt").write_bytes(content)
    assert cause in checkpoint_fault(tmp_path / "step_00000001.ckpt")
    with pytest.raises(FileNotFoundError, match=rf"step_00000001\.ckpt: .*{cause}"):
        latest_good_checkpoint(tmp_path)
