"""Environment of all tests: one thread, fixed seeds, NaN in uninitialized memory, offline."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # tests run in parallel (pytest -n)

MISSING = {  # part of the reason of a skipped test: command or setting that makes it run
    "ffmpeg": "apt-get install ffmpeg (or conda install -c conda-forge ffmpeg), version 4 to 8",
    "torchcodec": "apt-get install ffmpeg (or conda install -c conda-forge ffmpeg), version 4 to 8, for torchcodec",
    "BLUEBERRY_TEST_VIDEOS": "set BLUEBERRY_TEST_VIDEOS to a folder of real clips",
    "cuda": "a CUDA device",
    "qwen-vl-utils": "pip install --no-deps qwen-vl-utils==0.0.14 requests",
    "mamba": "the source of mamba-ssm on PYTHONPATH",
}


def pytest_terminal_summary(terminalreporter) -> None:
    """Lists the reasons of the skipped tests, with what makes them run."""
    for line in skipped_lines(terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(line)


def skipped_lines(reports: list) -> list[str]:
    """One line per file and reason: the number of skipped tests, the reason and, if it is known, the fix."""
    found: Counter[tuple[str, str]] = Counter()
    for report in reports:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        found[report.nodeid.split("::")[0], reason.removeprefix("Skipped: ")] += 1
    lines = []
    for (file, reason), count in sorted(found.items()):
        fix = next((fix for part, fix in MISSING.items() if part.lower() in reason.lower()), None)
        lines.append(f"skipped: {count} in {file}: {reason}" + (f". To run: {fix}" if fix else ""))
    return lines


@pytest.fixture(autouse=True)
def isolated_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Disables network access, API keys and user folders; a test that needs one sets it."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for variable in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "wandb"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Seeds all generators, so that a test does not depend on the tests that ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nan_in_uninitialized_memory() -> Iterator[None]:
    """Fills ``torch.empty`` with NaN, to detect reads of uninitialized memory."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def trainer(tmp_path: Path) -> Callable:
    """Returns ``trainer(*callbacks, **options)``, which builds a quiet CPU trainer of 2 steps without checkpoints."""

    def build(*callbacks, **options):
        import lightning  # slow, and not required by most tests

        names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        defaults = {**dict.fromkeys((*names, "use_distributed_sampler"), False), "max_steps": 2, "accelerator": "cpu"}
        defaults |= {"default_root_dir": tmp_path, "callbacks": list(callbacks)}
        return lightning.Trainer(**{**defaults, **options})

    return build
