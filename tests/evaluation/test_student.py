"""Students of a model of depth: initial weights, determinism, unchanged teachers, and early checks of settings."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from blueberry_video.data.pseudo_labels import PseudoLabelWriter
from blueberry_video.data.world import World
from blueberry_video.evaluation.student import StudentOfPseudoLabels, validated
from blueberry_video.models.depth_anything import DepthAnything
from blueberry_video.models.dinov2 import DINOv2
from blueberry_video.optim import constant
from blueberry_video.tasks.depth import Depth
from blueberry_video.tasks.depth_student import Student
from blueberry_video.tasks.settings import Optimization

SIZE = 28


def task(seed: int = 0) -> Depth:
    torch.manual_seed(seed)
    model = DepthAnything(DINOv2(SIZE, 1, 14, 16, 4, 2, table_size=2), (0, 1, 2, 3), 8, (4, 6, 8, 10))
    torch.nn.init.constant_(model.depth_head.scratch.output_conv2[2].bias, 0.5)
    optimization = Optimization(partial(torch.optim.AdamW, lr=1e-3), constant)
    return Depth(model, optimization, student=Student(cutmix=0.5))


def world(split: str, size: int, **changes) -> World:
    return World(split, size, **{"num_frames": 2, "image_size": SIZE, "supersample": 1, **changes})


def trainer(folder: Path, train, val) -> SimpleNamespace:
    data = SimpleNamespace(train=train, val=val)
    return SimpleNamespace(default_root_dir=str(folder), datamodule=data, global_step=7, strategy=None)


def callback(**changes) -> StudentOfPseudoLabels:
    return StudentOfPseudoLabels(PseudoLabelWriter(4), **{"steps": 5, "batch_size": 4, **changes})


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_a_student_starts_at_the_initial_weights_and_leaves_its_teacher_unchanged(tmp_path: Path):
    module, run = task(), trainer(tmp_path, world("train", 8), world("val", 4))
    student = callback()
    student.setup(run, module, "fit")
    initial = state(module)
    with torch.no_grad():
        for parameter in module.parameters():  # training
            parameter.add_(0.02 * torch.randn_like(parameter))
    trained = state(module)
    module.train()
    before = torch.get_rng_state()
    found = student.measure(run, module)
    assert torch.equal(torch.get_rng_state(), before)
    assert module.training
    torch.testing.assert_close(state(module), trained, rtol=0, atol=0)
    torch.testing.assert_close({f"model.{k}": v for k, v in state(student.untrained).items()}, initial, rtol=0, atol=0)
    assert found["abs_rel_teacher"] == pytest.approx(validated(module.eval(), run.datamodule.val, 3), rel=1e-5)
    assert student.measure(run, module) == found
    other = callback(seed=1)
    other.untrained = student.untrained
    assert other.measure(run, module)["abs_rel_student"] != found["abs_rel_student"]
    assert list(tmp_path.iterdir()) == []


def test_labels_are_those_of_the_teacher_and_ground_truth_is_not_read(tmp_path: Path):
    """Students of clips with different depth but equal frames are equal."""

    class Wrong(World):
        def __getitem__(self, index: int) -> dict:
            clip = super().__getitem__(index)
            return {**clip, "depth": torch.full_like(clip["depth"], 1e6)}

    results = []
    for kind in (World, Wrong):
        module = task(1)
        clips = kind("train", 8, 2, SIZE, supersample=1)
        run, student = trainer(tmp_path, world("val", 4), world("val", 4)), callback(clips=clips, num_clips=6)
        student.setup(run, module, "fit")
        results.append(student.measure(run, module))
    assert results[0] == results[1]
    assert results[0]["abs_rel_student_ratio"] == results[0]["abs_rel_student"] / results[0]["abs_rel_teacher"]


def test_learning_rate_and_schedule_are_those_of_the_task(tmp_path: Path):
    rates = []

    class Recorded(torch.optim.SGD):
        def step(self, closure=None):
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    module = task()
    module.optimization = Optimization(partial(Recorded, lr=1e-4), lambda step, total: 1 - step / total)
    run, student = trainer(tmp_path, world("train", 8), world("val", 2)), callback(steps=4, lr_scale=0.5)
    student.setup(run, module, "fit")
    student.measure(run, module)
    head, encoder = ([row[group] for row in rates] for group in (0, -1))
    assert head == pytest.approx([5e-4, 3.75e-4, 2.5e-4, 1.25e-4])
    assert encoder == pytest.approx([5e-5, 3.75e-5, 2.5e-5, 1.25e-5])


@pytest.mark.parametrize(
    ("settings", "train", "match"),
    [
        ({"batch_size": 9}, world("train", 8), r"callbacks\.student\.batch_size=9\b.*\b8 clips"),
        ({"num_clips": 3}, world("train", 8), r"callbacks\.student\.batch_size=4\b.*\b3 clips"),
        ({}, [{}] * 8, r"callbacks\.student\.clips=None.*list"),
    ],
)
def test_clips_are_checked_before_training(tmp_path: Path, settings: dict, train, match: str):
    with pytest.raises(ValueError, match=match):
        callback(**settings).setup(trainer(tmp_path, train, world("val", 2)), task(), "fit")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"steps": 0}, r"callbacks\.student\.steps=0\b"),
        ({"num_clips": 0}, r"callbacks\.student\.num_clips=0\b"),
        ({"name": "x", "lr_scale": 0}, r"callbacks\.x\.lr_scale=0\b"),
    ],
)
def test_bad_settings_raise(settings: dict, match: str):
    with pytest.raises(ValueError, match=match):
        callback(**settings)


def test_a_metric_model_raises_before_training(tmp_path: Path):
    module = task()
    module.model.max_depth = 20.0
    with pytest.raises(ValueError, match=r"model\.max_depth=20\.0"):
        callback().setup(trainer(tmp_path, world("train", 8), world("val", 2)), module, "fit")
