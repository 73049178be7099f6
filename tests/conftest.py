"""Environment of all tests: one thread, fixed seeds, NaN in uninitialized memory, offline."""

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from skipped_reasons import skipped_lines

torch.set_num_threads(1)  # tests run in parallel (pytest -n)


def pytest_terminal_summary(terminalreporter) -> None:
    """Lists the reasons of the skipped tests, with what makes them run."""
    for line in skipped_lines(terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def isolated_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Disables network access, API keys and user folders; a test that needs one sets it."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # a child would share the wandb service of an earlier test
    for variable in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "wandb"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Handles SIGINT, which a shell without job control lets the commands that it starts in the background ignore."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def normal_priority() -> Iterator[None]:
    """Takes back the real-time priority that SVT-AV1, as root, gives to the process that encodes.

    The process and all its later children would otherwise keep every other process from running.
    """
    yield
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


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
