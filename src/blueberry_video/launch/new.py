"""``make new EXP=<name>``: copies experiments/template/ to a new experiment."""

import re
import shutil
import sys
from pathlib import Path

from blueberry_video.launch.errors import OneParagraphErrors

NAME = re.compile(r"[a-z][a-z0-9_]*")


def new_experiment(name: str, root: Path = Path("experiments")) -> Path:
    """Copies ``<root>/template`` to ``<root>/<name>`` and writes the new name into its files.

    Raises:
        ValueError: if the name is not valid for a folder, an experiment and a Python package.
        FileExistsError: if the experiment exists; nothing is overwritten.
        FileNotFoundError: if there is no template.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            f"EXP={name!r} is not a valid name: use lower-case letters, digits and underscores, a letter first, "
            f"as in `make new EXP={re.sub(r'[^a-z0-9_]+', '_', name.lower()).strip('_0123456789') or 'my_idea'}`."
        )
    target, template = root / name, root / "template"
    if target.exists():
        raise FileExistsError(f"EXP={name}: {target} already exists: choose another name.")
    if not template.is_dir():
        raise FileNotFoundError(f"EXP={name}: {template} does not exist: run `make new` in the root of the repository.")
    shutil.copytree(template, target, ignore=shutil.ignore_patterns("__pycache__"))
    for file in target.rglob("*"):
        if file.suffix in (".md", ".yaml", ".py"):
            text = file.read_text().replace("EXP=template", f"EXP={name}")
            file.write_text(text.replace("name: template", f"name: {name}").replace("# template\n", f"# {name}\n"))
    return target


if __name__ == "__main__":
    with OneParagraphErrors():
        made = new_experiment(sys.argv[1] if len(sys.argv) > 1 else "")
    print(f"created {made}/: write the question in README.md, overrides in config.yaml; `make check EXP={made.name}`")
