"""``blueberry new <name>``: copies the template to a new experiment."""

import re
import shutil
import sys
from pathlib import Path

from blueberry_video.installation import IN_CLONE, shipped, start_command
from blueberry_video.launch.errors import OneParagraphErrors

NAME = re.compile(r"[a-z][a-z0-9_]*")


def new_experiment(name: str, root: Path = Path("experiments"), make: bool = IN_CLONE) -> Path:
    """Copies the template to ``<root>/<name>`` and writes the new name into its files.

    Args:
        name: name of the experiment.
        root: folder of the experiments. Its ``template``, if there is one, replaces the shipped one.
        make: whether the commands in the files are those of make.

    Raises:
        ValueError: if the name is not valid for a folder, an experiment and a Python package.
        FileExistsError: if the experiment exists; nothing is overwritten.
    """
    if not NAME.fullmatch(name):
        valid = re.sub(r"[^a-z0-9_]+", "_", name.lower()).strip("_0123456789") or "my_idea"
        raise ValueError(
            f"EXP={name!r} is not a valid name: use lower-case letters, digits and underscores, a letter first, "
            f"as in `{start_command('new', valid)}`."
        )
    target, template = root / name, root / "template"
    if target.exists():
        raise FileExistsError(f"EXP={name}: {target} already exists: choose another name.")
    if not template.is_dir():
        template = shipped("experiments/template")
    root.mkdir(parents=True, exist_ok=True)
    shutil.copytree(template, target, ignore=shutil.ignore_patterns("__pycache__"))
    for file in target.rglob("*"):
        if file.suffix in (".md", ".yaml", ".py"):
            text = file.read_text().replace("EXP=template", f"EXP={name}")
            text = text if make else re.sub(rf"make (\w+) EXP={name}\b", rf"blueberry \1 {name}", text)
            file.write_text(text.replace("name: template", f"name: {name}").replace("# template\n", f"# {name}\n"))
    return target


if __name__ == "__main__":
    with OneParagraphErrors():
        made = new_experiment(sys.argv[1] if len(sys.argv) > 1 else "")
    check = start_command("check", made.name)
    print(f"created {made}/: write the question in README.md, overrides in config.yaml; `{check}`")
