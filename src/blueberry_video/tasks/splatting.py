"""Reconstruction of a moving scene from posed views by Gaussian splatting."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blueberry_video.diffusion.frozen import Frozen
from blueberry_video.evaluation.nearest_view import NearestViews
from blueberry_video.evaluation.reconstruction import psnr, ssim
from blueberry_video.inference.camera_paths import turntable
from blueberry_video.models.gaussian_splatting import Camera, GaussianSplatting4D, Rasterized, Static
from blueberry_video.models.gaussian_splatting.densify import Densification, Statistics, camera_extent
from blueberry_video.models.gaussian_splatting.gaussians import degree_at
from blueberry_video.tasks.settings import ClipInput, Optimization
from blueberry_video.tasks.splatting_settings import (
    LearningRates,
    SceneLosses,
    check_scene_data,
    check_seen,
    check_trainer,
    check_view,
)
from blueberry_video.tasks.splatting_stages import StagedReconstruction
from blueberry_video.weights.files import read_weights

SSIM_WINDOW = 11  # pixels


class Splatting(StagedReconstruction):
    """Trains the Gaussians of one scene on its views; see ``docs/splatting.md``.

    Logs ``loss`` and its terms: ``l1``, ``dssim`` and those of the dynamics; and ``num_gaussians``. In validation also
    ``psnr`` (dB), ``ssim``, ``lpips`` with ``perceptual``, ``psnr_nearest`` of
    :class:`~blueberry_video.evaluation.nearest_view.NearestViews`, and ``psnr_nearest_gain``, the difference.

    Args:
        model, optimization, input, learning_rates, densification, coarse_steps: see
            :class:`~blueberry_video.tasks.splatting_stages.StagedReconstruction`.
        losses: weights of the losses.
        sh_interval: steps after which the degree of the spherical harmonics increases by 1.
        background: color of pixels without Gaussians; ``None``: that of ``data.train``, otherwise black.
        extent: size of the scene; ``None``: that of its cameras, see
            :func:`~blueberry_video.models.gaussian_splatting.densify.camera_extent`.
        use_points: starts from the point cloud of ``data.train``, if there is one.
        perceptual: distance of two images (N, 3, H, W) in [-1, 1] for validation, such as LPIPS.
        num_pictures, turntable_frames: number of views, and of frames of the turntable, in :meth:`media`.

    Raises:
        ValueError: for settings out of range; when a run begins: data without the views of a scene, initial points
            that no view sees, or settings of the trainer that do not fit.
    """

    background: Tensor

    def __init__(
        self,
        model: GaussianSplatting4D,
        optimization: Optimization,
        input: ClipInput | None = None,
        learning_rates: LearningRates | None = None,
        losses: SceneLosses | None = None,
        densification: Densification | None = None,
        coarse_steps: int = 3000,
        sh_interval: int = 1000,
        background: Sequence[float] | None = None,
        extent: float | None = None,
        use_points: bool = True,
        perceptual: nn.Module | None = None,
        num_pictures: int = 4,
        turntable_frames: int = 24,
    ):
        super().__init__(model, optimization, input, learning_rates, densification, coarse_steps)
        counts = {"sh_interval": sh_interval, "num_pictures": num_pictures, "turntable_frames": turntable_frames}
        for key, value in counts.items():
            if value < 1:
                raise ValueError(f"task.{key}={value} must be at least 1.")
        if extent is not None and not extent > 0:
            raise ValueError(f"task.extent={extent} must be above 0, or null for that of the cameras.")
        if background is not None and (len(background) != 3 or not all(0 <= value <= 1 for value in background)):
            raise ValueError(f"task.background={list(background)} must be three numbers from 0 to 1, or null.")
        self.losses, self.sh_interval, self.use_points = losses or SceneLosses(), sh_interval, use_points
        self._chosen_background, self._chosen_extent = background, extent
        self.perceptual = None if perceptual is None else Frozen(perceptual)
        self.num_pictures, self.turntable_frames = num_pictures, turntable_frames
        self.register_buffer("background", torch.tensor(list(background or (0.0, 0.0, 0.0))))
        self._views: Any = None
        self._nearest: NearestViews | None = None

    def setup(self, stage: str) -> None:
        views: Any = self.trainer.datamodule.train  # type: ignore[attr-defined]
        if stage == "fit":
            check_trainer(self.trainer)
            self.prepare(views)
        super().setup(stage)
        self.statistics.resize(self.model.number)  # init_from may have another number

    def prepare(self, views: Any) -> None:
        """Sets background, extent and initial points from the training views."""
        check_scene_data(views)
        self.extent = self._chosen_extent or camera_extent(views.poses)
        if self._chosen_background is None and hasattr(views, "background"):
            self.background.copy_(torch.tensor(views.background))
        if self.use_points and getattr(views, "points", None) is not None:
            self.model.initialize(views.points, views.colors)
        check_seen(self.model.gaussians.means.detach(), views)
        self.statistics = Statistics(self.model.number).to(self.background.device)
        self._views, self._nearest = views, NearestViews(views, self.extent)

    def render(self, batch: dict) -> Rasterized:
        """Renders the views of a batch, with the dynamics and harmonics of the current step of the training."""
        check_view(batch)
        size = (batch["video"].shape[-2], batch["video"].shape[-1])
        camera = Camera.from_pose(batch["poses"][:, 0], batch["intrinsics"], size)
        degree = degree_at(int(self.steps), self.sh_interval, self.model.sh_degree)
        return self.model.render(camera, batch["time"][:, 0], self.background, degree, not self.in_first_stage)

    def shared_step(self, batch: dict, stage: str) -> dict[str, Tensor]:
        rendered = self.render(batch)
        made, real = rendered.color[:, :, None], batch["video"]
        values = {"l1": (made - real).abs().mean()}
        if self.losses.dssim:
            values["dssim"] = 1 - ssim(made * 2 - 1, real * 2 - 1).mean()
        if not self.in_first_stage:
            values |= self.model.losses()
        weights = {"l1": 1.0, **asdict(self.losses)}
        values["loss"] = torch.stack([weights[name] * value for name, value in values.items()]).sum()
        values["num_gaussians"] = torch.tensor(float(self.model.number))
        if stage == "train":
            self._rendered = rendered
            return values
        return values | self.quality(made, batch)

    def quality(self, made: Tensor, batch: dict) -> dict[str, Tensor]:
        """Metrics (B,) of rendered views (B, 3, 1, H, W) in [0, 1]."""
        first, second = made * 2 - 1, batch["video"] * 2 - 1
        values = {"psnr": psnr(first, second)}
        if min(made.shape[-2:]) >= SSIM_WINDOW:
            values["ssim"] = ssim(first, second)
        if self.perceptual is not None:
            distance = self.perceptual.get().to(self.device)(first[:, :, 0].clamp(-1, 1), second[:, :, 0])
            values["lpips"] = distance.flatten(1).mean(1)
        if self._nearest is not None:
            values["psnr_nearest"] = self._nearest.psnr(batch)
        return values

    def epoch_metrics(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"psnr_nearest_gain": means["psnr"] - means["psnr_nearest"]} if "psnr_nearest" in means else {}

    @torch.no_grad()
    def media(self, batch: dict) -> dict[str, Tensor]:
        """``views``: ground truth and render, one row per view; ``turntable``: a circle around the scene in time."""
        chosen = {key: value[: self.num_pictures] for key, value in batch.items()}
        found = {"views": self.panels([chosen["video"], self.render(chosen).color.clamp(0, 1)[:, :, None]])}
        if self._views is not None:
            frames = self.turntable_frames
            like = {key: value[:1] for key, value in batch.items()}
            poses = turntable(self._views.poses, frames).to(self.device)
            times = torch.linspace(0, 1, frames, device=self.device)
            colors = [
                self.render({**like, "poses": pose[None, None], "time": time[None, None]}).color
                for pose, time in zip(poses, times, strict=True)
            ]
            found["turntable"] = torch.cat(colors).clamp(0, 1).mul(255).round().byte()
        return found

    def static_control(self, model: GaussianSplatting4D) -> "Splatting":
        """Returns an untrained task of the same settings, with the dynamics of ``model`` replaced by none."""
        model.dynamics = Static()
        return Splatting(
            model, replace(self.optimization, init_from=None), self.input, self.learning_rates, self.losses,
            self.densification, self.coarse_steps, self.sh_interval, self._chosen_background, self._chosen_extent,
            self.use_points,
        )  # fmt: skip

    def tokens_per_clip(self, batch: dict) -> int:
        """Number of Gaussians, which are rendered for each view."""
        return self.model.number

    def load_weights(self, path: str | Path) -> str:
        """Loads the model; outside of a run also the step of the training and the background."""
        message = self.model.load_published(path)
        if self._trainer is None:
            state = read_weights(path)
            for name in ("steps", "background"):
                if name in state:
                    getattr(self, name).copy_(state[name])
        return message
