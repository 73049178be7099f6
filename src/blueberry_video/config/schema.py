"""Schema of the root keys of a config."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from blueberry_video.installation import shipped

CONF = shipped("conf")

NODES = ("model", "task", "data", "optimizer", "schedule", "trainer", "logger", "callbacks")
"""Root keys that are instantiated: their keys are the parameters of the class or function in ``_target_``."""


@dataclass
class Config:
    """All root keys.

    Attributes:
        name: name of the experiment; runs are written to ``<output_dir>/<name>/<time>/``.
        seed: seed of all random numbers of the run: weights, sample order, augmentation, masks.
        model, task, data, optimizer, schedule, trainer: components that ``train.py`` instantiates.
        logger: logger in addition to metrics.csv in the run folder; empty: metrics.csv only.
        callbacks: name → callback, in the order of execution; null: disabled.
        expected: metric → ``at_least`` or ``at_most`` → value; checked at the end of the run.
        enforce_expected: exit with an error if an expected value is missed (``make gate``).
        optimized_metric: metric that ``train`` returns to a sweep; null: none.
        allow_targets: packages, modules or full names that ``_target_`` may name in addition to ``checks.CLASSES`` and
            ``checks.FUNCTIONS``. Applies on the command line only (``allow_targets=[my_package]``, or
            ``BLUEBERRY_ALLOW_TARGETS=my_package`` in the environment); in a file it is a record and allows nothing.
        init_from: run folder, checkpoint or published weights that initialize the encoder of the model.
        resume: ``last`` or the name of a run of this experiment, to continue in its folder.
        check: dry run instead of training (``make check``).
        output_dir: folder of all runs.
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
