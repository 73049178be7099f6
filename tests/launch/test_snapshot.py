"""Snapshot of code and config: its files, the state of git that runs record, and the code that a process imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blueberry_video.experiment.git import git_state
from blueberry_video.launch import snapshot

ROOT = Path(__file__).resolve().parents[2]
STATE = {"commit": "abc", "dirty": True, "diff_hash": "def"}


def project(folder: Path) -> Path:
    """A project of a user in git, with an experiment and a package; returns the config of the experiment."""
    for name, text in {
        "experiments/mine/config.yaml": "name: mine\n",
        "experiments/mine/notes.txt": "untracked",
        "my_package/__init__.py": "VALUE = 1\n",
        "outputs/mine/run.json": "{}",
        "weights.bin": "x" * (snapshot.LARGEST + 1),
        ".gitignore": "outputs/\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "experiments/mine/config.yaml"


def test_snapshot_has_the_files_of_git_and_runs_them_after_an_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here = tmp_path / "here"
    experiment = project(here)
    subprocess.run("git init -q . && git add my_package", shell=True, cwd=here, check=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}{os.pathsep}/elsewhere")
    found = snapshot.create(tmp_path / "copy", Path("experiments/mine/config.yaml"), STATE)
    assert found.experiment == tmp_path / "copy/project/experiments/mine/config.yaml"
    copied = {str(path.relative_to(tmp_path / "copy/project")) for path in (tmp_path / "copy/project").rglob("*.*")}
    assert {"my_package/__init__.py", "experiments/mine/notes.txt"} <= copied
    assert not {"outputs/mine/run.json", "weights.bin"} & copied
    code = tmp_path / "copy/code"
    assert (code / "conf/train.yaml").is_file()
    assert (code / "pyproject.toml").is_file()
    assert not list(code.rglob("__pycache__"))
    (here / "my_package/__init__.py").write_text("VALUE = 2\n")
    experiment.write_text("name: edited\n")
    assert found.experiment.read_text() == "name: mine\n"
    assert found.environment["PYTHONPATH"].split(os.pathsep) == [
        *map(str, (code / "src", code, tmp_path / "copy/project")),
        "/elsewhere",
        str(here),
    ]
    script = (
        "import my_package, blueberry_video; from blueberry_video.experiment.git import git_state;"
        "print(my_package.VALUE, blueberry_video.__file__, git_state(), sep='|')"
    )
    (here / "probe.py").write_text(script)
    command = [sys.executable, "-m", "probe"]
    result = subprocess.run(
        command, cwd=here, env={**os.environ, **found.environment}, capture_output=True, text=True, check=False
    )
    value, file, state = result.stdout.strip().split("|")
    assert (value, file) == ("1", str(code / "src/blueberry_video/__init__.py")), result.stderr
    assert state == str(STATE)


def test_experiment_outside_of_git_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    experiment = project(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(snapshot, "_copy_tree", lambda root, target: None)
    found = snapshot.create(tmp_path / "copy", experiment, STATE)
    assert found.experiment == tmp_path / "copy/experiment/mine/config.yaml"
    assert found.experiment.with_name("notes.txt").is_file()
    assert not (tmp_path / "copy/project").exists()


def test_snapshot_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "site-packages" / "blueberry_video"
    (package / "shipped" / "conf").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr(snapshot, "IN_CLONE", False)
    monkeypatch.setattr(snapshot, "PACKAGE", package)
    monkeypatch.setattr(snapshot, "ROOT", package / "shipped")
    found = snapshot.create(tmp_path / "copy", project(tmp_path / "here"), STATE)
    assert (tmp_path / "copy/code/blueberry_video/shipped/snapshot.json").is_file()
    assert found.environment["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path / "copy/code")


def test_state_of_git_is_that_of_the_working_directory_without_a_snapshot(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert git_state() == {"commit": None, "dirty": None, "diff_hash": None}
