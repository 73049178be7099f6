"""Makefile: the values of ARGS and of other variables reach the command as words, and nothing in them is executed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = ("JOBS", "RETRY", "FAIL_FAST", "NEW", "CLUSTER", "AT_ONCE")
VARIABLES = (
    "ARGS",
    "EXP",
    "SWEEP",
    "RESUME",
    "VIDEO",
    "MODEL",
    "OUT",
    "PROMPT",
    "DTYPE",
    "N",
    "CHECKPOINT",
    "DATA",
    *SWEEPS,
)
TARGETS = (
    *(
        "new",
        "check",
        "train",
        "sweep",
        "submit",
        "runs",
        "gate",
        "report",
        "latents",
        "export",
        "generate",
        "data",
        "shards",
    ),
    *("process", "depth", "pseudo_labels", "decode-bench", "test", "test-gpu", "bench-gpu", "fuzz-video"),
)
PYTHON = """#!{python}
import os, runpy, sys
if sys.argv[1:3] in (["-m", "blueberry_video.cli"], ["-m", "blueberry_video.launch.words"]):
    sys.executable, module, sys.argv = __file__, sys.argv[2], sys.argv[2:]
    sys.path.insert(0, {source!r})
    runpy.run_module(module, run_name="__main__")
    sys.exit()
with open("words.txt", "a") as file:
    print(*sys.argv[1:], sep="\\n", file=file)
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Makefile with a Python that writes its arguments to words.txt."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", ".venv/.installed"):  # the last one is the newest
        (tmp_path / name).touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(PYTHON.format(python=sys.executable, source=str(ROOT / "src")))
    python.chmod(0o755)
    return tmp_path


def words(repository: Path, target: str, **variables: str) -> list[str]:
    """Arguments that the command of a target receives."""
    command = ["make", target, *(f"{name}={value}" for name, value in variables.items())]
    # MAKEFLAGS has the variables of the make that runs the tests
    environment = {key: value for key, value in os.environ.items() if key not in {*VARIABLES, "MAKEFLAGS"}}
    result = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return (repository / "words.txt").read_text().splitlines()


@pytest.mark.parametrize("attack", ["a; touch x | touch x $(touch x) `touch x` $(shell touch x)", "'$(touch x)'"])
def test_no_value_is_executed(repository: Path, attack: str):
    for target in TARGETS:
        words(repository, target, **dict.fromkeys(VARIABLES, attack))
        assert not (repository / "x").exists(), target


@pytest.mark.parametrize(
    ("target", "end"),
    [
        ("data", ["-m", "blueberry_video.data.write"]),
        ("test", ["-m", "pytest", "-n", "2"]),
        ("process", ["--model", "m"]),
        ("shards", ["-m", "blueberry_video.data.shards", "d", "--out=o"]),
        ("export", ["-m", "blueberry_video.export", "outputs/e", "--out", "o", "--dtype", "float32"]),
    ],
)
def test_quotes_in_args_group_words(repository: Path, target: str, end: list[str]):
    arguments = words(
        repository,
        target,
        ARGS="out='my folder' -k \"a or $HOME\" *",
        VIDEO="v.mp4",
        MODEL="m",
        EXP="e",
        OUT="o" if target in ("export", "shards") else "",
        DATA="d",
    )
    assert arguments[-4 - len(end) :] == [*end, "out=my folder", "-k", "a or $HOME", "*"]


def test_generate_passes_its_values_as_words(repository: Path):
    attack = "$(touch x) `touch x` 'a\" b' --overwrite"
    arguments = words(
        repository, "generate", EXP="e", OUT="my clip.mp4", PROMPT=attack, VIDEO="a b.mp4", ARGS="--num 2"
    )
    expected = ["outputs/e", "--out=my clip.mp4", f"--prompt={attack}", "--video=a b.mp4", "--num", "2"]
    assert arguments == ["-m", "blueberry_video.generate", *expected]
    assert not (repository / "x").exists()
    (repository / "words.txt").unlink()
    assert words(repository, "generate", EXP="e", OUT="o.mp4")[2:] == ["outputs/e", "--out=o.mp4"]


def test_an_open_quote_is_reported(repository: Path):
    result = subprocess.run(
        ["make", "data", "ARGS=out='a"], cwd=repository, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "ARGS=`out='a`" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_of_data_is_printed(repository: Path):
    assert words(repository, "data", ARGS="--help") == ["-m", "blueberry_video.data.write", "--help"]


def outdated(repository: Path) -> None:
    """Makes the installation older than pyproject.toml."""
    os.utime(repository / ".venv" / ".installed", (1, 1))


def make(repository: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *arguments], cwd=repository, capture_output=True, text=True, check=False)


def test_nothing_is_installed_into_a_linked_environment(repository: Path):
    outdated(repository)
    (repository / ".venv").rename(repository / "shared")
    (repository / ".venv").symlink_to("shared")
    result = make(repository, "new", "EXP=mine")
    assert result.returncode != 0
    assert ".venv is a link to shared" in result.stderr
    assert "make PYTHON=.venv/bin/python " in result.stderr
    assert not (repository / "words.txt").exists()
    assert make(repository, "new", "EXP=mine", "PYTHON=.venv/bin/python").returncode == 0
    assert (repository / "words.txt").read_text().split() == ["-m", "blueberry_video.launch.new", "mine"]


def test_nothing_is_installed_into_the_environment_of_a_different_folder(repository: Path):
    outdated(repository)
    packages = repository / ".venv" / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    other = repository / "other"
    (other / "src").mkdir(parents=True)
    (packages / "__editable__.blueberry_video-0.1.0.pth").write_text(f"{other / 'src'}\n")
    result = make(repository, "doctor")
    assert result.returncode != 0
    assert f".venv contains the project of {other}" in result.stderr
    assert not (repository / "words.txt").exists()


def test_own_environment_is_updated(repository: Path):
    outdated(repository)
    packages = repository / ".venv" / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    (repository / "src").mkdir()
    (packages / "__editable__.blueberry_video-0.1.0.pth").write_text(f"{repository / 'src'}\n")
    assert make(repository, "doctor").returncode == 0
    assert "--editable" in (repository / "words.txt").read_text().split()


def test_code_of_this_folder_runs_in_any_environment(repository: Path):
    python = repository / "python"
    python.write_text('#!/bin/sh\necho "$PYTHONPATH" >path.txt\n')
    python.chmod(0o755)
    assert make(repository, "doctor", "PYTHON=./python").returncode == 0
    assert (repository / "path.txt").read_text().strip().split(":")[0] == str(repository / "src")
