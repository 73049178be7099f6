"""Files and commands that depend on the installation: a clone of the repository, or a wheel."""

import re
import shlex
import sys
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "blueberry-video"
PACKAGE = Path(__file__).resolve().parent
IN_CLONE = PACKAGE.parent.name == "src" and (PACKAGE.parents[1] / "pyproject.toml").is_file()
ROOT = PACKAGE.parents[1] if IN_CLONE else PACKAGE / "shipped"  # setup.py copies the files of the wheel there
SNAPSHOT = ROOT / "snapshot.json"  # in the copy of the code that a submitted job runs


def shipped(name: str) -> Path:
    """Returns the path of ``conf``, ``experiments/template`` or ``constraints.txt``, in a clone and in a wheel."""
    return ROOT / name


def install_command(extra: str, *packages: str) -> str:
    """Returns the command that installs an extra of pyproject.toml, or from a wheel its requirements.

    Args:
        extra: name of the extra.
        packages: the packages of the extra that are needed, by import or distribution name; all if empty.
    """
    if IN_CLONE:
        environment = ".venv/bin/" if Path(sys.prefix) == ROOT / ".venv" else ""
        return f"{environment}pip install -e '.[{extra}]'"
    quoted = (f"'{each}'" for each in requirements(extra, *packages))
    return f"pip install {' '.join(quoted)}"


def requirements(extra: str, *packages: str) -> list[str]:
    """Returns the requirements of an extra according to the installed package, or ``packages`` without metadata."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        lines = []
    wanted = {_canonical(name) for name in packages}
    found = [line.partition(";")[0].strip() for line in lines if re.search(rf"extra == ['\"]{extra}['\"]", line)]
    chosen = [line for line in found if not wanted or _canonical(re.split(r"[^\w.-]", line)[0]) in wanted]
    return chosen or list(packages) or [extra]


def start_command(name: str, experiment: str = "", **variables: str) -> str:
    """Returns the command line of ``blueberry <name>``, in a clone that of make.

    Args:
        name: command, such as ``train``.
        experiment: name of the experiment; empty: none.
        variables: variables of make, such as ``RESUME="last"``. ``ARGS`` and ``SWEEP`` are the words of the console
            command, and the others its options.
    """
    if IN_CLONE:
        text = {key: f'"{value}"' if key == "SWEEP" else shlex.quote(value) for key, value in variables.items()}
        text = {key: variables[key] if variables[key].startswith("<") else value for key, value in text.items()}
        words = [f"EXP={experiment}" if experiment else "", *(f"{key}={value}" for key, value in text.items())]
        return " ".join(filter(None, ["make", name.replace("-", "_"), *words]))
    words = [value if key in ("ARGS", "SWEEP") else f"--{key.lower()} {value}" for key, value in variables.items()]
    return " ".join(filter(None, ["blueberry", name, experiment, *words]))


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
