"""Atomic writes: after an exception or a kill the destination has its old content."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blueberry_video import atomic
from blueberry_video.atomic import atomic_file, atomic_folder, write_bytes, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("sync_folder", [False, True])
def test_file_appears_on_exit_and_replaces_an_older_one(tmp_path: Path, unique: bool, sync_folder: bool):
    path = tmp_path / "a.txt"
    for text in (b"old", b"new"):
        before = path.read_bytes() if path.exists() else None
        with atomic_file(path, unique, sync_folder) as file:
            file.write(text)
            file.flush()
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == text
    assert names(tmp_path) == ["a.txt"]


def test_bytes_and_text(tmp_path: Path):
    write_bytes(tmp_path / "bytes", b"\x00\xff")
    write_text(tmp_path / "text", "ü\n")
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert (tmp_path / "text").read_bytes() == b"\xc3\xbc\n"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exception_keeps_the_old_file(tmp_path: Path, error: type[BaseException]):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def write() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_failed_sync_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_concurrent_writers_of_one_file_have_separate_temporary_files(tmp_path: Path):
    path = tmp_path / "a.txt"
    with atomic_file(path, unique=True) as first, atomic_file(path, unique=True) as second:
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first"  # closed last
    assert names(tmp_path) == ["a.txt"]


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from blueberry_video.atomic import atomic_file, atomic_folder
path = Path(sys.argv[1])
if sys.argv[2] == "file":
    with atomic_file(path) as file:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
with atomic_folder(path) as folder:
    (folder / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_a_writer(path: Path, kind: str) -> None:
    result = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(path), kind], check=False)
    assert result.returncode == -9


def test_kill_keeps_the_old_file_and_the_next_write_succeeds(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    kill_a_writer(path, "file")
    assert path.read_text() == "old"
    assert names(tmp_path) == [".a.txt.tmp", "a.txt"]
    write_text(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


def test_folder_appears_on_exit(tmp_path: Path):
    path = tmp_path / "parent" / "out"
    with atomic_folder(path) as folder:
        (folder / "a").write_text("a")
        assert not path.exists()
    assert names(path) == ["a"]
    assert names(tmp_path / "parent") == ["out"]


def test_exception_leaves_no_folder(tmp_path: Path):
    def write() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("a")
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        write()
    assert names(tmp_path) == []


def test_kill_leaves_no_folder_and_the_next_write_succeeds(tmp_path: Path):
    kill_a_writer(tmp_path / "out", "folder")
    assert names(tmp_path) == [".out.tmp"]
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a"]


def make_full(path: Path) -> None:
    path.mkdir()
    (path / "mine").touch()


def make_file(path: Path) -> None:
    path.touch()


def test_folder_replaces_an_empty_one(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert names(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("make", [make_full, make_file])
def test_folder_replaces_nothing_else(tmp_path: Path, make: Callable[[Path], None]):
    make(tmp_path / "out")
    with pytest.raises(OSError, match="out"), atomic_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert names(tmp_path) == ["out"]
    assert not (tmp_path / "out" / "a").exists()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, r"No space left on device: \S+/a\.txt needs 3 bytes, and \d+ bytes are free in \S+"),
        (errno.EDQUOT, r"quota.*: \S+/a\.txt needs 3 bytes"),
        (errno.EROFS, r"Read-only file system: \S+/a\.txt .*writable"),
        (errno.EACCES, r"Permission denied: \S+/a\.txt .*writable"),
    ],
)
def test_errors_of_the_disk_name_file_and_fix(tmp_path: Path, monkeypatch, code: int, expected: str):
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic.os, "fsync", fail)
    with pytest.raises(OSError, match=expected) as raised:
        write_text(tmp_path / "a.txt", "new")
    assert raised.value.errno == code
    assert type(raised.value) is (PermissionError if code == errno.EACCES else OSError)
    assert names(tmp_path) == []


def test_file_in_place_of_a_folder_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"file/a\.txt .*another folder"):
        write_text(tmp_path / "file" / "a.txt", "new")
    with pytest.raises(OSError, match=r"file/.*another folder"), atomic_folder(tmp_path / "file" / "out"):
        pass
