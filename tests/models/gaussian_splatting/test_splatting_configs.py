"""Configs of Gaussian splatting: published sizes, and settings that equal the defaults of the classes."""

import dataclasses

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from blueberry_video.config import CONF
from blueberry_video.models.gaussian_splatting import Camera, Deformation, Native, Static
from blueberry_video.models.gaussian_splatting.densify import Densification
from blueberry_video.tasks.splatting_settings import LearningRates, SceneLosses

FILES = sorted(file.stem for file in (CONF / "model/gaussian_splatting").glob("*.yaml"))


def build(name: str):
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose(overrides=[f"+model=gaussian_splatting/{name}", "+seed=0", "model.num_points=20"])
    return instantiate(config.model)


@pytest.mark.parametrize("name", FILES)
def test_models_render(name: str):
    model = build(name)
    kind = name.removeprefix("tiny_")
    assert isinstance(model.dynamics, {"native": Native, "static": Static}.get(kind, Deformation))
    pose = torch.eye(4)
    pose[2, 3] = -6
    intrinsics = torch.tensor([[20.0, 0, 8], [0, 20, 8], [0, 0, 1]])
    with torch.no_grad():
        rendered = model.render(Camera.from_pose(pose, intrinsics, (16, 16)), 0.3)
    assert rendered.alpha.max() > 0.05


@pytest.mark.parametrize(
    ("name", "features", "resolution", "scales", "width", "heads"),
    [
        ("deformation", 32, (64, 25), (1, 2), 64, 3),
        ("hypernerf", 16, (64, 150), (1, 2, 4), 128, 3),
        ("neu3d", 16, (64, 150), (1, 2), 128, 5),
    ],
)
def test_published_sizes(name: str, features: int, resolution: tuple, scales: tuple, width: int, heads: int):
    dynamics = build(name).dynamics
    assert tuple(dynamics.field.planes[0]["zt"].shape) == (features, resolution[1], resolution[0])
    assert (dynamics.field.scales, dynamics.trunk[0].out_features, len(dynamics.heads)) == (scales, width, heads)


def test_settings_of_the_task_are_the_defaults_of_their_classes():
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose(overrides=["+task=splatting"])
    for key, kind in (("learning_rates", LearningRates), ("losses", SceneLosses), ("densification", Densification)):
        assert instantiate(config.task[key]) == kind(), key
        assert {field.name for field in dataclasses.fields(kind)} == set(config.task[key]) - {"_target_"}
