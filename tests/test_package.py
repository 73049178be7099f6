"""Wheel: built, installed into a folder, and used from a different one, without the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "src",
    "conf",
    "experiments/template",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "constraints.txt",
)
PROCESS = """
import blueberry_video
from blueberry_video.data.sprites import Sprites
from blueberry_video.data.write import write_video
from blueberry_video.video import process_video
from pathlib import Path

frames = Sprites("train", 1, image_size=64)[0]["video"].permute(0, 2, 3, 1).numpy()
write_video(Path("clip.mp4"), frames, fps=8)
video = process_video("clip.mp4")
print(blueberry_video.__file__, tuple(video.pixels.shape), video.metadata.total_tokens)
"""

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "PYTEST"))}
    environment = kept | ({"PYTHONPATH": str(path)} if path else {})
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder into which the wheel is installed, without dependencies."""
    work = tmp_path_factory.mktemp("package")
    for name in SOURCES:
        source, target = ROOT / name, work / "source" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    options = ["-q", "--no-deps", "--disable-pip-version-check"]
    built = run("-m", "pip", "wheel", *options, "--no-build-isolation", "-w", work, work / "source", cwd=work)
    assert built.returncode == 0, built.stderr
    [wheel] = work.glob("*.whl")
    result = run("-m", "pip", "install", *options, "--target", work / "installed", wheel, cwd=work)
    assert result.returncode == 0, result.stderr
    shutil.rmtree(work / "source")
    return work / "installed"


def test_files_of_the_package(installed: Path):
    package = installed / "blueberry_video"
    for folder in ("conf", "experiments/template"):
        files = {file.relative_to(ROOT) for file in (ROOT / folder).rglob("*.*") if file.suffix != ".pyc"}
        shipped = {file.relative_to(package / "shipped") for file in (package / "shipped" / folder).rglob("*.*")}
        assert shipped == files
    assert (package / "py.typed").is_file()
    assert (package / "shipped" / "constraints.txt").read_text() == (ROOT / "constraints.txt").read_text()
    source = ROOT / "src" / "blueberry_video"
    data = {file.relative_to(source) for file in source.rglob("*.*") if file.suffix not in (".py", ".pyc")}
    assert [file for file in data if not (package / file).is_file()] == []


def test_process_video_with_default_arguments(installed: Path, tmp_path: Path):
    result = run("-c", PROCESS, cwd=tmp_path, path=installed)
    assert result.returncode == 0, result.stderr
    module, shape, tokens = re.fullmatch(r"(\S+) \((.*)\) (\d+)\n", result.stdout).groups()
    assert module == str(installed / "blueberry_video" / "__init__.py")
    assert len(shape.split(",")) == 4
    assert int(tokens) > 0


def test_new_experiment_and_one_training_step(installed: Path, tmp_path: Path):
    command = installed / "bin" / "blueberry"
    helped = run(command, "--help", cwd=tmp_path, path=installed)
    assert helped.returncode == 0
    assert re.search(r"^  train +\S", helped.stdout, re.MULTILINE)
    made = run(command, "new", "my_idea", cwd=tmp_path, path=installed)
    assert made.returncode == 0, made.stderr
    assert "`blueberry check my_idea`" in made.stdout

    typo = run(command, "train", "my_idea", "trainer.max_step=1", cwd=tmp_path, path=installed)
    assert typo.returncode == 1
    assert re.search(r"`trainer\.max_step=1`(?s:.)*`trainer\.max_steps`", typo.stderr)
    wrong = run(command, "train", "my_ide", cwd=tmp_path, path=installed)
    assert wrong.returncode == 1
    assert re.search(r"'my_ide'(?s:.)*`my_idea`", wrong.stderr)
    assert not (tmp_path / "outputs").exists()

    trained = run(command, "train", "my_idea", "trainer.max_steps=1", cwd=tmp_path, path=installed)
    assert trained.returncode == 0, trained.stderr
    [folder] = (tmp_path / "outputs" / "my_idea").iterdir()
    assert (folder / "report.html").is_file()
    record = json.loads((folder / "run.json").read_text())
    [expected] = record["expected"]  # a trivial predictor does not meet it
    assert record["metrics"]["val/loss_trivial"] > expected["limit"]
    assert record["commit"] is None
    assert (folder / "metrics.csv").read_text().count("\n") >= 2


def test_install_command_outside_a_clone(installed: Path, tmp_path: Path):
    code = "from blueberry_video.installation import install_command as i; print(i('pretrained', 'peft'), i('exr'))"
    result = run("-c", code, cwd=tmp_path, path=installed)
    assert result.stdout == "pip install 'peft>=0.21' pip install 'OpenEXR>=3.3'\n"
