"""Default settings of the evaluations: reported numbers of runs without them in their config depend on these."""

import inspect

import pytest

from blueberry_video.evaluation.closed_loop import ClosedLoop
from blueberry_video.evaluation.collapse import CollapseMonitor
from blueberry_video.evaluation.generated_shapes import GeneratedShapes
from blueberry_video.evaluation.metrics import recalled_by_class
from blueberry_video.evaluation.probes import FewLabels, Probe
from blueberry_video.evaluation.supervised import Recipe

DEFAULTS = {
    ClosedLoop: {"episodes": 50, "goal_steps": 6, "min_distance": 0.3, "tolerance": 0.075, "max_steps": 15}
    | {"random_tries": 20, "split": 2, "seed": 0},
    CollapseMonitor: {"every_n_steps": 100, "after_steps": 300, "min_std": 0.05, "min_rank": 3.0, "max_cosine": 0.999}
    | {"patience": 2, "stop": False},
    GeneratedShapes: {"clips": 144, "batch_size": 72, "seed": 0},
    Probe: {"train_clips": 2000, "val_clips": 1000, "steps": 600, "batch_size": 64, "lr": 1e-3, "weight_decay": 0.01}
    | {"seed": 0, "part": None},
    FewLabels: {"num_labelled": 400, "val_clips": 1000, "steps": 600, "batch_size": 32, "weight_decay": 0.05}
    | {"lrs": (5e-4, 1e-3, 2e-3, 4e-3), "seed": 0, "part": None},
    Recipe: {"batch_size": 64, "lr": 1e-3, "weight_decay": 0.05, "seed": 0},
    recalled_by_class: {"k": 5},
}


@pytest.mark.parametrize(("built", "expected"), DEFAULTS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_defaults(built, expected: dict):
    parameters = inspect.signature(built).parameters
    assert {name: parameters[name].default for name in expected} == expected
