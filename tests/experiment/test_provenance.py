"""Provenance: git state, versions and hardware of a run."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from blueberry_video.experiment import provenance
from blueberry_video.experiment.git import git_state


@pytest.fixture
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Returns ``git(*arguments)`` in a repository of two commits with a file in a folder."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)

    def call(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    call("init")
    (tmp_path / "src").mkdir()
    for text in ("a = 1\n", "a = 2\n"):
        (tmp_path / "src" / "code.py").write_text(text)
        (tmp_path / ".gitignore").write_text("outputs/\n")
        call("add", ".")
        call("commit", "-m", text)
    return call


def test_clean_tree_has_the_newest_commit(git, tmp_path: Path):
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False, "diff_hash": None}
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "run.json").write_text("{}")
    assert not git_state(tmp_path)["dirty"], "ignored files are no changes"


@pytest.mark.parametrize("name", ["new.py", "src/new file.py", "ümlaut.py"])
@pytest.mark.parametrize("empty", [False, True])
def test_untracked_file_alone_makes_a_run_dirty(git, tmp_path: Path, name: str, empty: bool):
    (tmp_path / name).write_text("" if empty else "b = 1\n")
    first = git_state(tmp_path)
    assert (first["dirty"], len(first["diff_hash"])) == (True, 64)
    assert git_state(tmp_path) == first, "the same code has the same hash"
    (tmp_path / name).write_text("b = 2\n")
    second = git_state(tmp_path)
    (tmp_path / name).rename(tmp_path / "renamed.py")
    third = git_state(tmp_path)
    assert len({state["diff_hash"] for state in (first, second, third)}) == 3
    assert {state["commit"] for state in (first, second, third)} == {git("rev-parse", "HEAD")}


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("kind", ["changed", "deleted", "binary"])
def test_change_of_a_tracked_file_makes_a_run_dirty(git, tmp_path: Path, staged: bool, kind: str):
    file = tmp_path / "src" / "code.py"
    hashes = set()
    for content in (b"\x00\xff", b"\x00\xfe") if kind == "binary" else (b"a = 3\n",):
        file.write_bytes(content)
        if kind == "deleted":
            file.unlink()
        if staged:
            git("add", "-A")
        state = git_state(tmp_path)
        assert state["dirty"] is True
        hashes.add(state["diff_hash"])
    assert len(hashes) == (2 if kind == "binary" else 1)


def test_changes_outside_a_folder_of_the_repository_count(git, tmp_path: Path):
    (tmp_path / "other.py").write_text("c = 1\n")
    assert git_state(tmp_path / "src") == git_state(tmp_path)
    assert git_state(tmp_path / "src")["dirty"]


def test_broken_link_is_part_of_the_hash(git, tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    assert git_state(tmp_path)["dirty"] is True


@pytest.mark.parametrize("missing", ["repository", "commit", "git"])
def test_without_a_commit_all_is_unknown(tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch):
    if missing == "commit":
        subprocess.run(["git", "init"], cwd=tmp_path, check=True, capture_output=True)
    if missing == "git":
        monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) == {"commit": None, "dirty": None, "diff_hash": None}


def test_versions_of_installed_packages(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    found = provenance.versions()
    assert found == {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "no-such-package": None,
        "cuda": torch.version.cuda,
    }


def test_hardware_in_its_units(monkeypatch: pytest.MonkeyPatch):
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**20 * 3 // 2}
    monkeypatch.setattr(provenance.os, "sysconf", sizes.__getitem__)
    monkeypatch.setattr(provenance.os, "sched_getaffinity", lambda process: {1, 5, 7}, raising=False)
    monkeypatch.setattr(provenance.os, "cpu_count", lambda: 64)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: f"GPU {index}")
    found = provenance.hardware()
    assert {key: found[key] for key in ("cores", "memory_gib", "gpus")} == {
        "cores": 3,
        "memory_gib": 6.0,
        "gpus": ["GPU 0", "GPU 1"],
    }
    monkeypatch.delattr(provenance.os, "sched_getaffinity")
    assert provenance.hardware()["cores"] == 64


def test_name_of_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nmodel name\t: Fast CPU: 3 GHz\nprocessor : 1\nmodel name\t: Other\n")
    monkeypatch.setattr(provenance, "Path", lambda path: file)
    assert provenance.hardware()["cpu"] == "Fast CPU: 3 GHz"
    file.write_text("processor : 0\n")
    monkeypatch.setattr(provenance.platform, "processor", lambda: "arm")
    assert provenance._cpu_model() == "arm"
    file.unlink()
    monkeypatch.setattr(provenance.platform, "processor", lambda: "")
    monkeypatch.setattr(provenance.platform, "machine", lambda: "aarch64")
    assert provenance._cpu_model() == "aarch64"
