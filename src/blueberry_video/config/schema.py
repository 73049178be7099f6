"""The root of every config."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

CONF = Path(__file__).resolve().parents[3] / "conf"

NODES = ("model", "task", "data", "optimizer", "schedule", "trainer", "logger", "callbacks")
"""Root keys whose content is instantiated: their keys are the parameters of what ``_target_`` names."""


@dataclass
class Config:
    """Every root key.

    Attributes:
        name: of the experiment; runs go to ``<output_dir>/<name>/<time>/``.
        seed: of every random number of the run: weights, sample order, augmentation, masks.
        model, task, data, optimizer, schedule, trainer: what ``train.py`` builds and passes to one another.
        logger: a logger beside the run folder's own metrics.csv; empty: metrics.csv alone.
        callbacks: name → callback, in the order in which they act; null: switched off.
        expected: metric → ``at_least`` or ``at_most`` → value: the verdicts at the end of the run.
        enforce_expected: exit with an error where an expected value is missed (``make gate``).
        optimized_metric: the metric that ``train`` returns to a sweep; null: none.
        allow_targets: packages, modules or full names that ``_target_`` may name besides ``checks.ALLOWED``.
        init_from: a run folder, a checkpoint or published weights that the model's encoder starts from.
        resume: ``last`` or the name of a run of this experiment, to continue in its own folder.
        check: dry run instead of training (``make check``).
        output_dir: where runs are written.
    """

    name: str = MISSING
    seed: int = 0
    model: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    expected: dict[str, Any] = field(default_factory=dict)
    enforce_expected: bool = False
    optimized_metric: str | None = "val/loss"
    allow_targets: list[str] = field(default_factory=list)
    init_from: str | None = None
    resume: str | None = None
    check: bool = False
    output_dir: str = "outputs"
