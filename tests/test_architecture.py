"""Who may import whom: the table of docs/architecture.md, and a reader of imports that holds the code to it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "blueberry_video"
MAX_LINES = {"train.py": 150, "export.py": 150, "precompute.py": 150}  # entry points; other files: 500, tasks: 200
ANYTHING = None

MAY_IMPORT: dict[str, set[str] | None] = {
    "atomic": set(),
    "config": set(),
    "optim": set(),
    "masking": set(),
    "video": set(),
    "ops": set(),
    "nn": {"ops"},
    "evaluation": {"nn"},
    "models": {"nn"},
    "data": {"video"},
    "inference": {"models", "nn", "video"},
    "tasks": {"models", "nn", "masking", "optim", "inference", "evaluation"},
    "callbacks": {"evaluation", "video"},
    "experiment": {"config", "evaluation", "video"},
    "launch": {"config", "evaluation", "video"},
    "train": ANYTHING,
    "precompute": ANYTHING,
    "export": ANYTHING,
}
EVERYWHERE = {"atomic"}  # any room may import these
SHARED_IN_ROOM = {"models": {"vit"}}  # of its own room a model may import only these; other rooms are open inside


def imported_modules(tree: ast.AST, module: str, is_package: bool) -> list[str]:
    """Dotted names of everything that a module imports, anywhere in it, with relative imports made absolute."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{source}.{alias.name}" for alias in node.names]
    return found


def forbidden_imports(source: Path) -> list[str]:
    """One sentence for every import under ``source`` (a src/ folder) that the table does not allow."""
    faults = []
    for file in sorted((source / PACKAGE).rglob("*.py")):
        inside = file.relative_to(source).with_suffix("").parts
        module = ".".join(inside[:-1] if inside[-1] == "__init__" else inside)
        room = inside[1]
        if room == "__init__":
            continue
        if room not in MAY_IMPORT:
            faults.append(f"{file.relative_to(source)} is in no room of docs/architecture.md")
            continue
        for name in imported_modules(ast.parse(file.read_text()), module, inside[-1] == "__init__"):
            top, _, rest = name.partition(".")
            if top == "experiments":
                faults.append(f"{module} imports {name}: src never imports experiments")
            allowed, other = MAY_IMPORT[room], rest.split(".")[0]
            if top != PACKAGE or allowed is ANYTHING or other in ("", "__version__"):
                continue
            if other == room:
                shared = SHARED_IN_ROOM.get(room)
                if shared is not None and len(inside) > 2 and rest.split(".")[1] not in shared:
                    faults.append(f"{module} imports {name}: of other {room} only {', '.join(sorted(shared))}")
            elif other not in allowed | EVERYWHERE:
                faults.append(
                    f"{module} imports {name}: {room} may import only {', '.join(sorted(allowed)) or 'nothing'}"
                )
    return faults


def table_of_the_docs() -> tuple[dict[str, set[str] | None], dict[str, set[str]]]:
    """The table in docs/architecture.md: room → rooms it may import, and room → what may be shared inside it."""
    text = (ROOT / "docs" / "architecture.md").read_text().split("### Who may import whom")[1].split("\n## ")[0]
    table: dict[str, set[str] | None] = {}
    shared: dict[str, set[str]] = {}
    for rooms, allowed in re.findall(r"^\| (`.+?) \| (.+?) \|$", text, re.MULTILINE):
        usual, _, inside = allowed.partition("; of other")
        for room in re.findall(r"`(\w+)`", rooms):
            table[room] = ANYTHING if usual == "anything" else set(re.findall(r"`(\w+)`", usual))
            if inside:
                shared[room] = set(re.findall(r"`(\w+)`", inside))
    return table, shared


def test_every_import_is_allowed():
    assert forbidden_imports(ROOT / "src") == []


def test_this_table_is_the_one_of_the_docs():
    assert table_of_the_docs() == (MAY_IMPORT, SHARED_IN_ROOM)


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("nn/blocks.py", "from blueberry_video.tasks.base import Task", "nn may import only ops"),
        ("nn/blocks.py", "import blueberry_video.models.vit", "nn may import only ops"),
        ("nn/blocks.py", "from ..models import vit", "nn may import only ops"),
        ("nn/blocks.py", "def f():\n    from blueberry_video import train", "nn may import only ops"),
        ("optim.py", "from .masking import TubeMasking", "optim may import only nothing"),
        ("config/__init__.py", "from ..video import decode", "config may import only nothing"),
        ("models/other.py", "from .classifier import VideoClassifier", "of other models only vit"),
        ("experiment/report.py", "from blueberry_video.launch import doctor", "experiment may import only config"),
        ("callbacks.py", "import experiments.mine.model", "src never imports experiments"),
        ("utils.py", "", "is in no room"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, file: str, line: str, said: str):
    planted = tmp_path / PACKAGE / file
    planted.parent.mkdir(parents=True)
    planted.write_text(line)
    [fault] = forbidden_imports(tmp_path)
    assert said in fault


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("tasks/masked_pixels.py", "from blueberry_video.tasks.base import Task\nfrom ..models import vit"),
        ("models/classifier.py", "from blueberry_video.models import vit\nfrom .vit import VisionTransformer"),
        ("train.py", "import blueberry_video.experiment.report"),
        ("nn/blocks.py", "import torch\nfrom blueberry_video import __version__\nfrom .attention import Attention"),
        ("video/cache.py", "from blueberry_video.atomic import atomic_file"),
    ],
)
def test_an_allowed_import_is_let_through(tmp_path: Path, file: str, line: str):
    planted = tmp_path / PACKAGE / file
    planted.parent.mkdir(parents=True)
    planted.write_text(line)
    assert forbidden_imports(tmp_path) == []


def test_no_room_is_too_full():
    package = ROOT / "src" / PACKAGE
    limits = {
        file: MAX_LINES.get(file.name, 200 if file.parent.name == "tasks" else 500) for file in package.rglob("*.py")
    }
    lines = {file: len(file.read_text().splitlines()) for file in limits}
    assert {str(file.relative_to(package)): lines[file] for file in limits if lines[file] > limits[file]} == {}


def test_no_constructor_takes_keyword_arguments_it_does_not_name():
    takers = [
        f"{file.name}:{method.lineno}"
        for file in (ROOT / "src").rglob("*.py")
        for owner in ast.walk(ast.parse(file.read_text()))
        if isinstance(owner, ast.ClassDef)
        for method in owner.body
        if isinstance(method, ast.FunctionDef) and method.name == "__init__" and method.args.kwarg
    ]
    assert takers == []
