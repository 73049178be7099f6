"""Settings of scene reconstruction: learning rates by role, weights of the losses, and checks of data and trainer."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from torch import Tensor

CLIP_KEYS = ("video", "intrinsics", "poses", "time")
DECAYED = ("means", "grid", "deformation", "velocity")  # roles with the schedule of the run; others are constant
SPATIAL = DECAYED  # roles with a rate in units of the extent of the scene


@dataclass(frozen=True)
class LearningRates:
    """Learning rates of Adam by role, those of 4D-GS for D-NeRF scenes; a model uses the roles that it has.

    Attributes:
        means: positions, times the extent of the scene; decays.
        sh_dc, sh_rest: spherical harmonics, constant and others.
        opacity, scale, rotation: logits, logarithms and quaternions.
        grid, deformation: planes and MLP of the deformation, times the extent; decay.
        time: time centers and log-durations of native dynamics.
        velocity: velocities of native dynamics, times the extent; decays.
        others_final: factor on the other rates at the last step, to which they decay exponentially in the second
            stage. 1 as published, for runs of 20,000 steps; in a short run constant rates end in noise.

    Raises:
        ValueError: for a rate that is not above 0.
    """

    means: float = 1.6e-4
    sh_dc: float = 2.5e-3
    sh_rest: float = 1.25e-4
    opacity: float = 0.05
    scale: float = 5e-3
    rotation: float = 1e-3
    grid: float = 1.6e-3
    deformation: float = 1.6e-4
    time: float = 5e-3
    velocity: float = 1e-3
    others_final: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"task.learning_rates.{field.name}={getattr(self, field.name)} must be above 0.")

    def of(self, roles: Sequence[str], extent: float) -> dict[str, float]:
        """Returns the rates of these roles in a scene."""
        return {role: getattr(self, role) * (extent if role in SPATIAL else 1) for role in roles}


@dataclass(frozen=True)
class SceneLosses:
    """Weights of the losses that are added to L1, those of 4D-GS for D-NeRF scenes.

    Attributes:
        dssim: 1 - SSIM.
        spatial_smoothness, time_smoothness, time_planes: regularization of the planes in the second stage, see
            :meth:`~blueberry_video.models.gaussian_splatting.HexPlane.losses`.
        speed: velocities of native dynamics in the second stage.

    Raises:
        ValueError: for a negative weight.
    """

    dssim: float = 0.0
    spatial_smoothness: float = 1e-4
    time_smoothness: float = 0.01
    time_planes: float = 1e-4
    speed: float = 0.01

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"task.losses.{field.name}={getattr(self, field.name)} must be at least 0.")


def check_scene_data(views: Any) -> None:
    """Checks that a dataset has the views of one scene.

    Raises:
        ValueError: for a dataset of another kind, no views, or a first clip that is no view.
    """
    name = type(views).__name__
    if not all(hasattr(views, key) for key in ("poses", "times")):
        raise ValueError(
            f"data.train={name} has no poses and times of a scene: use data=scene_folder or data=world_scene."
        )
    if not len(views):
        raise ValueError(f"data.train={name} has no views: a scene requires at least one.")
    check_view({key: value[None] for key, value in views[0].items() if isinstance(value, Tensor)})


def check_view(batch: dict) -> None:
    """Raises a ValueError if clips are no views: they lack a camera or a time, or have more than one frame."""
    missing = [key for key in CLIP_KEYS if key not in batch]
    if missing:
        raise ValueError(
            f"clips have {', '.join(batch)}, but task=splatting requires also {', '.join(missing)}: use "
            "data=scene_folder or data=world_scene."
        )
    frames = batch["poses"].shape[1]
    if frames != 1 or batch["time"].shape[1:] != (1,):
        raise ValueError(
            f"poses has shape {tuple(batch['poses'].shape)} and time {tuple(batch['time'].shape)}: a view has one "
            "frame, so they must be (B, 1, 4, 4) and (B, 1). Use data=scene_folder or data=world_scene."
        )


def check_seen(points: Tensor, views: Any) -> None:
    """Checks that a training view sees at least one of the initial points (N, 3).

    Raises:
        ValueError: if no view does.
    """
    view = views[0]
    height, width = view["video"].shape[-2:]
    for pose in views.poses.to(points):
        local = (points - pose[:3, 3]) @ pose[:3, :3]
        pixels = local @ view["intrinsics"].to(points).mT
        ahead = local[:, 2] > 0
        x, y = (pixels[:, :2] / pixels[:, 2:]).unbind(1)
        if (ahead & (x >= 0) & (x < width) & (y >= 0) & (y < height)).any():
            return
    low, high = (torch.round(value, decimals=3).tolist() for value in torch.aminmax(points, dim=0))
    raise ValueError(
        f"none of the {len(views)} training views sees one of the {len(points)} initial points, from {low} to {high}: "
        "set model.bounds to the region that the cameras view, or correct the poses (OpenCV camera-to-world)."
    )


def check_trainer(trainer: Trainer) -> None:
    """Checks the settings of a run that density control depends on.

    Raises:
        ValueError: for several processes, gradient accumulation, a precision below 32 bits, or an EMA of the weights.
    """
    reason = "because Gaussians are cloned and pruned in training"
    if trainer.world_size > 1:
        raise ValueError(
            f"trainer.devices={trainer.world_size} must be 1 for task=splatting, {reason}: use trainer=cpu or "
            "trainer=gpu, and a larger data.batch_size."
        )
    if trainer.accumulate_grad_batches > 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} must be 1 for task=splatting: use a "
            "larger data.batch_size."
        )
    if str(trainer.precision) not in ("32-true", "64-true"):
        raise ValueError(
            f"trainer.precision={trainer.precision} must be 32-true (or 64-true) for task=splatting: positions need "
            "32 bits."
        )
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, WeightAveraging) for callback in callbacks):
        raise ValueError(f"callbacks.ema={WeightAveraging.__name__} must be null for task=splatting, {reason}.")
