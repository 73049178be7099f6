"""Dependencies of pyproject.toml: every one is used, and every import of src is declared."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {  # distribution: its module, if the name differs
    "hydra-core": "hydra",
    "pyyaml": "yaml",
    "pillow": "PIL",
    "huggingface-hub": "huggingface_hub",
    "mamba-ssm": "mamba_ssm",
    "openexr": "OpenEXR",
    "vector-quantize-pytorch": "vector_quantize_pytorch",
    "qwen-vl-utils": "qwen_vl_utils",
    "hydra-submitit-launcher": "hydra_plugins",
    "pytest-xdist": "xdist",
    "flask-cors": "flask_cors",
}
TOOLS = {
    "pytest-xdist",
    "ruff",
    "mypy",
    "setuptools",
    "onnxruntime",
    "mkdocs",
    "mkdocs-material",
    "mkdocstrings",
}  # of `make test`, `make lint`, `make docs`, tests/test_package.py
PLUGINS = {  # imported by fsspec and by Hydra (hydra/launcher=submitit_slurm or joblib, hydra/sweeper=optuna)
    "hydra-submitit-launcher",
    "hydra-joblib-launcher",
    "hydra-optuna-sweeper",
    "s3fs",
    "gcsfs",
}
UNDECLARED = {"torchvision"}  # its video reader ended with 0.26, which requires an older torch than this project


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in requirements}


def module(name: str) -> str:
    return MODULES.get(name, name)


def imported(folder: str) -> set[str]:
    """Top-level modules that files import, also by name: ``import_extra("x")``, ``importorskip("x")``."""
    found: set[str] = set()
    for file in (ROOT / folder).rglob("*.py"):
        text = file.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).partition(".")[0])
        found |= set(re.findall(r"(?:import_extra|importorskip|import_module)\(\s*[\"'](\w+)", text))
    return found


def test_every_dependency_is_imported():
    used = imported("src")
    extras = PROJECT["optional-dependencies"]
    declared = names(PROJECT["dependencies"]).union(*(names(extras[name]) for name in extras if name != "dev"))
    assert {name for name in declared - PLUGINS - TOOLS if module(name) not in used} == set()
    in_tests = used | imported("tests") | imported("benchmarks")
    assert {name for name in names(extras["dev"]) - TOOLS if module(name) not in in_tests} == set()


def test_every_import_is_declared():
    extras = PROJECT["optional-dependencies"]
    declared = names(PROJECT["dependencies"]).union(*(names(lines) for name, lines in extras.items() if name != "dev"))
    modules = {module(name) for name in declared}
    ours = {"blueberry_video", "hydra_plugins"}
    assert imported("src") - set(sys.stdlib_module_names) - ours - UNDECLARED - modules == set()


def test_every_extra_is_named_in_code_or_docs():
    text = (
        "".join(file.read_text() for file in (ROOT / "src").rglob("*.py")) + (ROOT / "docs/installation.md").read_text()
    )
    unused = {name for name in PROJECT["optional-dependencies"] if not re.search(rf"[\"'`]{name}[\"'`]", text)}
    assert unused == set()


def test_compromised_and_untested_versions_are_excluded():
    """Packages of which private attributes are used end before the next untested minor version."""
    requirements = {re.match(r"[\w-]+", line)[0]: line for line in PROJECT["dependencies"]}
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for name in ("lightning", "wandb"):
        major, minor = map(int, pinned[name].split(".")[:2])
        assert f"<{major}.{minor + 1}" in requirements[name]
    assert {"!=2.6.2", "!=2.6.3"} <= set(requirements["lightning"].removeprefix("lightning").split(","))
