"""Snapshot of code and config: the copy that a submitted job runs, also when the working tree is edited later."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from blueberry_video.atomic import write_text
from blueberry_video.installation import IN_CLONE, PACKAGE, ROOT, SNAPSHOT

LARGEST = 2**20  # bytes of a file; larger ones are weights or data, which a job reads from the directory of submission
PARTS = ("src", "conf", "experiments", "pyproject.toml", "constraints.txt")  # of a clone without git
IGNORED = shutil.ignore_patterns("__pycache__", "outputs", ".git")


class Snapshot(NamedTuple):
    """Snapshot of code and config.

    Attributes:
        experiment: the copy of the experiment's config file.
        environment: environment variables of a process that runs the code of the snapshot.
    """

    experiment: Path
    environment: dict[str, str]


def create(target: Path, experiment: Path, git: Mapping[str, Any]) -> Snapshot:
    """Copies the code of this project, the experiment, and the project around the working directory.

    Of a git working tree, tracked and untracked files are copied, and no ignored ones. Paths in the config stay
    relative to the working directory.

    Args:
        target: folder of the copies, which does not exist.
        experiment: the config file of the experiment.
        git: state of the working tree in git, which is recorded.
    """
    target, experiment, here = target.absolute(), experiment.absolute(), Path.cwd()
    code, project = target / "code", target / "project"
    if IN_CLONE:
        _copy_tree(ROOT, code)
        paths, record = [code / "src", code], code / SNAPSHOT.name
    else:
        shutil.copytree(PACKAGE, code / PACKAGE.name, ignore=IGNORED)
        paths, record = [code], code / PACKAGE.name / "shipped" / SNAPSHOT.name
    if IN_CLONE and experiment.is_relative_to(ROOT):
        copy = code / experiment.relative_to(ROOT)
    elif experiment.is_relative_to(here) and _listed(here) is not None:
        _copy_tree(here, project)
        paths.append(project)
        copy = project / experiment.relative_to(here)
    else:
        copy = target / "experiment" / experiment.parent.name / experiment.name
    if not copy.is_file():  # not listed by git
        shutil.copytree(experiment.parent, copy.parent, ignore=IGNORED, dirs_exist_ok=True)
    time = datetime.now().astimezone().isoformat(timespec="seconds")
    record.parent.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps({"git": dict(git), "source": str(ROOT), "time": time}))
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    inherited = [path for path in others if path and Path(path).resolve() not in (ROOT / "src", here, here / "src")]
    path = os.pathsep.join(map(str, [*paths, *inherited, here]))
    return Snapshot(copy, {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"})  # the working directory comes last


def _copy_tree(root: Path, target: Path) -> None:
    for name in _listed(root) or _found(root):
        source = root / name
        if source.is_file() and source.stat().st_size <= LARGEST:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)


def _listed(root: Path) -> list[str] | None:
    """Returns the files below ``root`` that git tracks or would add; None outside a working tree of git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        result = subprocess.run(command, cwd=root, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    if result.returncode != 0:
        return None
    return sorted({os.fsdecode(name) for name in result.stdout.split(b"\0") if name})


def _found(root: Path) -> Iterator[str]:
    for part in PARTS:
        for file in [root / part, *sorted((root / part).rglob("*"))]:
            if file.is_file() and "__pycache__" not in file.parts:
                yield str(file.relative_to(root))
