"""Who may import whom: the table of docs/architecture.md, and a reader of imports that holds the code to it."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "blueberry_video"
MAX_LINES = {
    "train.py": 150,
    "export.py": 150,
    "precompute.py": 150,
    "generate.py": 150,
    "reconstruct.py": 150,
    "plan.py": 150,
    "depth.py": 150,
    "pseudo_labels.py": 150,
    "render.py": 150,
    "cli.py": 150,
    "submit.py": 150,
    "runs.py": 150,
    "estimate.py": 150,
    "data_check.py": 150,
    "push.py": 150,
    "features.py": 150,
}  # entry points; other files: 600, tasks: 200
ANYTHING = None

# room -> rooms it may import; `models.encoder` is one part of a room, `models` the whole room
MAY_IMPORT: dict[str, set[str] | None] = {
    "atomic": set(),  # any room may import it and `installation`
    "installation": set(),
    "config": set(),
    "optim": set(),
    "masking": set(),
    "augmentation": set(),
    "rand_augment": set(),
    "video": set(),
    "ops": set(),
    "weights": set(),
    "parallel": {"ops"},
    "nn": {"parallel"},
    "models": {"nn", "ops", "parallel", "weights"},
    "diffusion": {"models.autoencoder", "models.text_encoder", "nn", "weights"},
    "evaluation": {"diffusion", "models.encoder", "models.text_encoder", "nn", "parallel", "weights"},
    "data": {"video", "parallel"},
    "inference": {"data", "models", "nn", "ops", "weights"},
    "tasks": {
        "models",
        "diffusion",
        "nn",
        "masking",
        "augmentation",
        "optim",
        "inference",
        "evaluation",
        "parallel",
        "weights",
    },
    "callbacks": {"nn", "parallel"},
    "experiment": {"config", "launch.machine", "launch.scheduler", "parallel", "weights"},
    "launch": {"config", "parallel"},
    "cli": {"launch"},
    "train": ANYTHING,
    "precompute": ANYTHING,
    "export": ANYTHING,
    "generate": ANYTHING,
    "generated_videos": ANYTHING,
    "reconstruct": ANYTHING,
    "plan": ANYTHING,
    "depth": ANYTHING,
    "pseudo_labels": ANYTHING,
    "trained_model": ANYTHING,
    "predict": ANYTHING,
    "push": ANYTHING,
    "pretrained_encoder": ANYTHING,
    "features": ANYTHING,
    "evaluate": ANYTHING,
    "render": ANYTHING,
    "estimate": ANYTHING,
    "submit": ANYTHING,
    "runs": ANYTHING,
    "data_check": ANYTHING,
}
SHARED_IN_ROOM = {  # what a family may import besides itself
    "models": {"autoencoder", "encoder", "diffusion_transformer", "vit", "dinov2", "classifier"}
}


def module_name(file: Path, source: Path) -> str:
    """Dotted name of a file under ``source``; of a package, the name of the package."""
    return ".".join(file.relative_to(source).with_suffix("").parts).removesuffix(".__init__")


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


def imports(source: Path) -> list[tuple[str, str]]:
    """(importing module, imported name) of every import under ``source``, a src/ folder."""
    found = []
    for file in sorted((source / PACKAGE).rglob("*.py")):
        module = module_name(file, source)
        names = imported_modules(ast.parse(file.read_text()), module, file.name == "__init__.py")
        found += [(module, name) for name in names]
    return found


def permission(importer: str, name: str) -> str | None:
    """The entry of ``MAY_IMPORT`` that allows the room of ``importer`` to import ``name``; ``""`` where none is needed,
    ``None`` where the import is forbidden."""
    room, (top, *rest) = importer.split(".")[1:], name.split(".")
    if top == "experiments":
        return None
    if (
        top != PACKAGE
        or not room
        or not rest
        or rest[0] in ("__version__", "atomic", "installation")
        or MAY_IMPORT.get(room[0]) is ANYTHING
    ):
        return ""
    if rest[0] == room[0]:
        shared = SHARED_IN_ROOM.get(room[0])
        own = shared is None or len(room) < 2 or len(rest) < 2 or rest[1] in {room[1], *shared}
        return "" if own else None
    allowed = MAY_IMPORT[room[0]] or set()
    return next((entry for entry in (rest[0], ".".join(rest[:2])) if entry in allowed), None)


def forbidden_imports(source: Path) -> list[str]:
    """One sentence for every import under ``source`` (a src/ folder) that the table does not allow."""
    rooms = {module_name(file, source) for file in (source / PACKAGE).rglob("*.py")} - {PACKAGE}
    unknown = sorted(module for module in rooms if module.split(".")[1] not in MAY_IMPORT)
    faults = [f"{module} is in no room of docs/architecture.md" for module in unknown]
    for importer, name in imports(source):
        if importer not in unknown and permission(importer, name) is None:
            allowed = sorted(MAY_IMPORT[importer.split(".")[1]] or {"nothing else"})
            faults.append(f"{importer} imports {name}: it may import only {', '.join(allowed)}")
    return faults


def table_of_the_docs() -> tuple[dict[str, set[str] | None], dict[str, set[str]]]:
    """The table in docs/architecture.md: room → rooms it may import, and room → what may be shared inside it."""
    text = (ROOT / "docs" / "architecture.md").read_text().split("### Who may import whom")[1].split("\n## ")[0]
    table: dict[str, set[str] | None] = {}
    shared: dict[str, set[str]] = {}
    for rooms, allowed in re.findall(r"^\| (`.+?) \| (.+?) \|$", text, re.MULTILINE):
        usual, _, inside = allowed.partition("; of other")
        for room in re.findall(r"`(\w+)`", rooms):
            table[room] = ANYTHING if usual == "anything" else set(re.findall(r"`([\w.]+)`", usual))
            if inside:
                shared[room] = set(re.findall(r"`(\w+)`", inside))
    return table, shared


def test_every_import_is_allowed():
    assert forbidden_imports(ROOT / "src") == []


def test_every_permission_is_used():
    used = {
        (importer.split(".")[1], permission(importer, name))
        for importer, name in imports(ROOT / "src")
        if "." in importer
    }
    granted = {(room, entry) for room, allowed in MAY_IMPORT.items() for entry in allowed or ()}
    assert granted - used == set()


def test_this_table_is_the_one_of_the_docs():
    assert table_of_the_docs() == (MAY_IMPORT, SHARED_IN_ROOM)


def test_no_module_imports_itself_in_a_circle():
    modules = {module_name(file, ROOT / "src") for file in (ROOT / "src").rglob("*.py")}
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for importer, name in imports(ROOT / "src"):
        target = name if name in modules else name.rpartition(".")[0]
        if target in modules and target != PACKAGE:
            graph[importer].add(target)
    circles = TopologicalSorter(graph)
    circles.prepare()  # raises CycleError, which names the modules


def test_a_module_of_nn_is_used_by_two_families():
    """Directly or through other modules of nn/; a room outside models/ counts as one user."""
    modules = {module_name(file, ROOT / "src") for file in (ROOT / "src" / PACKAGE / "nn").glob("*.py")} - {
        f"{PACKAGE}.nn"
    }
    users: dict[str, set[str]] = {module: set() for module in modules}
    through: dict[str, set[str]] = {module: set() for module in modules}
    for importer, name in imports(ROOT / "src"):
        target = name if name in modules else name.rpartition(".")[0]
        if target in modules:
            room = importer.split(".")[1:]
            if room[0] == "nn":
                through[target].add(importer)
            else:
                users[target].add(room[1] if room[0] == "models" else room[0])
    for module in TopologicalSorter(through).static_order():  # users of nn modules come first
        for other in through[module]:
            users[module] |= users[other]
    assert {module: families for module, families in users.items() if len(families) < 2} == {}


def test_modules_of_nn_and_ops_touch_no_file():
    readers = r"\bopen\(|\bPath\(|torch\.(load|save)\(|safetensors|read_text|write_text"
    rooms = [file for room in ("nn", "ops") for file in (ROOT / "src" / PACKAGE / room).glob("*.py")]
    assert [file.name for file in rooms if re.search(readers, file.read_text())] == []


def test_module_names_in_strings_exist():
    """Dotted names in src, also those in strings and docstrings, are those of a module or of something in it."""
    found = []
    for file in (ROOT / "src").rglob("*.py"):
        for name in re.findall(rf"(?<!torch\.ops\.){PACKAGE}(?:\.\w+)+", file.read_text()):
            path = ROOT / "src" / Path(*name.split("."))
            parent = path.parent
            if name.endswith((".py", ".yaml")) or path.is_dir() or path.with_suffix(".py").is_file():
                continue
            homes = [parent / "__init__.py", parent.with_suffix(".py"), parent.parent.with_suffix(".py")]
            package = parent.parent / "__init__.py"
            if package.is_file() and re.search(rf"\b{parent.name}\b", package.read_text()):
                homes += parent.parent.glob("*.py")  # a method of a class that the package exports
            text = "".join(home.read_text() for home in homes if home.is_file())
            if not re.search(rf"\b{path.name}\b", text):
                found.append(f"{file.relative_to(ROOT)}: {name}")
    assert found == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("nn/blocks.py", "from blueberry_video.tasks.base import Task"),
        ("nn/blocks.py", "import blueberry_video.models.vit"),
        ("nn/blocks.py", "from ..models import vit"),
        ("nn/blocks.py", "def f():\n    from blueberry_video import train"),
        ("optim.py", "from .masking import TubeMasking"),
        ("config/__init__.py", "from ..video import decode"),
        ("models/spool/model.py", "from blueberry_video.models.jepa import JEPA"),
        ("models/spool/model.py", "from ..jepa.model import JEPA"),
        ("models/vit.py", "from blueberry_video.models.spool import Spool"),
        ("diffusion/samplers.py", "from blueberry_video.models.cogvideox import CogVideoX"),
        ("evaluation/metrics.py", "from blueberry_video.models.vit import VisionTransformer"),
        ("experiment/report.py", "from blueberry_video.launch import doctor"),
        ("callbacks.py", "import experiments.mine.model"),
        ("utils.py", ""),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, file: str, line: str):
    planted = tmp_path / PACKAGE / file
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(line)
    [fault] = forbidden_imports(tmp_path)
    assert module_name(planted, tmp_path) in fault


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("tasks/masked_pixels.py", "from blueberry_video.tasks.base import Task\nfrom ..models import vit"),
        ("models/classifier.py", "from blueberry_video.models import vit\nfrom .vit import VisionTransformer"),
        ("models/spool/model.py", "from blueberry_video.models.spool.attention import FrameBlock\nfrom ..vit import x"),
        ("diffusion/encoding.py", "from blueberry_video.models.autoencoder.base import sample"),
        ("train.py", "import blueberry_video.experiment.report"),
        ("nn/blocks.py", "import torch\nfrom blueberry_video import __version__\nfrom .attention import Attention"),
        ("video/cache.py", "from blueberry_video.atomic import atomic_file"),
    ],
)
def test_an_allowed_import_passes(tmp_path: Path, file: str, line: str):
    planted = tmp_path / PACKAGE / file
    planted.parent.mkdir(parents=True)
    planted.write_text(line)
    assert forbidden_imports(tmp_path) == []


def test_no_room_is_too_full():
    package = ROOT / "src" / PACKAGE
    limits = {
        file: MAX_LINES.get(str(file.relative_to(package)), 200 if file.parent.name == "tasks" else 600)
        for file in package.rglob("*.py")
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
