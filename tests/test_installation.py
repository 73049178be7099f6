"""Paths and commands that depend on the installation."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from blueberry_video import installation
from blueberry_video.installation import install_command, requirements, shipped, start_command

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = [
    "torch>=2",
    'transformers>=5.20; extra == "pretrained"',
    'vector_quantize.pytorch>=1.32; extra == "dev"',
    "triton>=3.5; (sys_platform == 'linux') and extra == 'dev'",
]


def test_paths_in_a_clone():
    assert installation.IN_CLONE
    for name in ("conf", "experiments/template", "constraints.txt"):
        assert shipped(name) == ROOT / name
        assert shipped(name).exists()


def test_commands_in_a_clone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(installation.sys, "prefix", "/usr")
    assert install_command("exr") == "pip install -e '.[exr]'"
    monkeypatch.setattr(installation.sys, "prefix", str(ROOT / ".venv"))
    assert install_command("exr") == ".venv/bin/pip install -e '.[exr]'"
    assert start_command("train", "x", RESUME="last") == "make train EXP=x RESUME=last"
    assert start_command("train", "x", ARGS="a=1 b=2") == "make train EXP=x ARGS='a=1 b=2'"
    assert start_command("sweep", "…", SWEEP="seed=1,2") == 'make sweep EXP=… SWEEP="seed=1,2"'
    assert start_command("pseudo-labels", OUT="<folder>") == "make pseudo_labels OUT=<folder>"


def test_commands_outside_a_clone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(installation, "IN_CLONE", False)
    monkeypatch.setattr(installation, "metadata", SimpleNamespace(requires=lambda name: REQUIRED))
    assert install_command("pretrained", "transformers") == "pip install 'transformers>=5.20'"
    assert requirements("dev") == ["vector_quantize.pytorch>=1.32", "triton>=3.5"]
    assert requirements("dev", "vector-quantize_pytorch") == ["vector_quantize.pytorch>=1.32"]
    assert requirements("none", "lpips") == ["lpips"]
    assert start_command("train", "x", RESUME="last", ARGS="a=1 b=2") == "blueberry train x --resume last a=1 b=2"
    assert start_command("sweep", "x", SWEEP="seed=1,2") == "blueberry sweep x seed=1,2"
