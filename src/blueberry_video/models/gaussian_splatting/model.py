"""4D Gaussian Splatting (arXiv 2310.08528): a scene of moving Gaussians that renders any camera at any time.

Shapes: N Gaussians, C cameras, H x W pixels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from blueberry_video.models.gaussian_splatting.dynamics import Dynamics
from blueberry_video.models.gaussian_splatting.gaussians import (
    CanonicalGaussians,
    Gaussians,
    PerGaussian,
    random_points,
)
from blueberry_video.ops import Rasterized, rasterize
from blueberry_video.weights.files import read_weights, resolve
from blueberry_video.weights.load import load_strictly

PARTS = ("gaussians.", "dynamics.")  # of the names of tensors in a checkpoint; others belong to the task


class Camera(NamedTuple):
    """Pinhole camera, or C cameras of one image size. OpenCV axes: x right, y down, z forward."""

    intrinsics: Tensor  # (3, 3) or (C, 3, 3), in pixels
    world_to_camera: Tensor  # (4, 4) or (C, 4, 4), rigid
    image_size: tuple[int, int]  # height, width

    @classmethod
    def from_pose(cls, pose: Tensor, intrinsics: Tensor, image_size: tuple[int, int]) -> "Camera":
        """Camera of a rigid camera-to-world transform (…, 4, 4)."""
        turn, center = pose[..., :3, :3], pose[..., :3, 3:]
        top = torch.cat([turn.mT, -turn.mT @ center], -1)
        return cls(intrinsics, torch.cat([top, pose[..., 3:, :]], -2), image_size)


class GaussianSplatting4D(nn.Module):
    """Canonical Gaussians and their dynamics.

    Args:
        dynamics: :class:`~blueberry_video.models.gaussian_splatting.deformation.Deformation`,
            :class:`~blueberry_video.models.gaussian_splatting.dynamics.Native` or
            :class:`~blueberry_video.models.gaussian_splatting.dynamics.Static`.
        num_points: Gaussians at initialization, at random positions; replaced by ``initialize``.
        bounds: box from which positions are drawn: half the side of a cube around the origin, or two corners.
        sh_degree: degree of the spherical harmonics, 0 to 3.
        seed: seed of the initial positions and times.
        backend: backend of the rasterizer; by device and dtype if ``None``.

    Raises:
        ValueError: for arguments out of range.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        num_points: int = 2000,
        bounds: float | Sequence[Sequence[float]] = 1.3,
        sh_degree: int = 3,
        seed: int = 0,
        backend: str | None = None,
    ):
        super().__init__()
        if num_points < 1:
            raise ValueError(f"num_points={num_points} must be at least 1.")
        self.sh_degree, self.seed, self.backend, self.dynamics = sh_degree, seed, backend, dynamics
        generator = torch.Generator("cpu").manual_seed(seed)
        points = random_points(num_points, bounds, generator)
        self.gaussians = CanonicalGaussians(points, sh_degree=sh_degree).to(torch.empty(0).device)  # maybe meta
        dynamics.reset(self.gaussians, generator)

    def initialize(self, points: Tensor, colors: Tensor | None = None) -> None:
        """Replaces the Gaussians by those of a point cloud (N, 3) with colors (N, 3) from 0 to 1.

        Parameters are replaced: call this before creating the optimizer.
        """
        device = self.gaussians.means.device
        self.gaussians = CanonicalGaussians(points, colors, self.sh_degree).to(device)
        self.dynamics.reset(self.gaussians, torch.Generator("cpu").manual_seed(self.seed))

    @property
    def number(self) -> int:
        """N, the number of Gaussians."""
        return self.gaussians.number

    def load_published(self, weights: str | Path) -> str:
        """Loads a checkpoint of a run of this model strictly, with its number of Gaussians; returns a message."""
        state = {name: value for name, value in read_weights(resolve(weights)).items() if name.startswith(PARTS)}
        if isinstance(means := state.get("gaussians.means"), Tensor):
            for module in self.modules():
                if isinstance(module, PerGaussian):
                    module.resize(len(means))
        load_strictly(self, state, weights, "Choose the model settings of the run that wrote them.")
        return f"loaded {self.number} Gaussians from {weights}"

    def forward(self, time: float | Tensor, use_dynamics: bool = True) -> Gaussians:
        """Returns the Gaussians at a time.

        Args:
            time: in [0, 1]; a number or tensor () for one time, (C,) for C times.
            use_dynamics: False returns the canonical Gaussians, as in the first stage of training.

        Raises:
            ValueError: for a time outside [0, 1] (checked on the CPU only, as a check on a GPU would synchronize) or of
                another shape.
        """
        times = torch.as_tensor(time, dtype=self.gaussians.means.dtype)
        if times.ndim > 1:
            raise ValueError(f"time has shape {tuple(times.shape)}: it must be () or (C,).")
        if not times.is_cuda and not ((times >= 0) & (times <= 1)).all():  # also for NaN
            raise ValueError(
                f"time={times.tolist()} must be in [0, 1]: divide frame indices by the number of frames - 1."
            )
        if not use_dynamics:
            return self.gaussians()
        times = times.to(self.gaussians.means.device)
        found = self.dynamics(self.gaussians, times.reshape(-1))
        if times.ndim:
            return found
        dimensions = (2, 2, 2, 1, 3)
        return Gaussians(*(value if value.ndim == n else value[0] for value, n in zip(found, dimensions, strict=True)))

    def render(
        self,
        camera: Camera,
        time: float | Tensor,
        background: Tensor | None = None,
        sh_degree: int | None = None,
        use_dynamics: bool = True,
    ) -> Rasterized:
        """Renders one or more cameras.

        Args:
            camera: one camera, or C cameras.
            time: one time, or with C cameras C times.
            background: (3,) or (C, 3); black if ``None``.
            sh_degree: degree of the harmonics in use; all if ``None``.
            use_dynamics: see :meth:`forward`.

        Returns:
            color (C, 3, H, W), alpha and depth (C, H, W), means2d and radii; without C for one camera.
        """
        return render(self(time, use_dynamics), camera, background, sh_degree, self.backend)

    def losses(self) -> dict[str, Tensor]:
        """Regularization losses of the dynamics, without weights."""
        return self.dynamics.losses()

    def parameter_roles(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by role; a role is a group of the optimizer with a separate learning rate."""
        own = self.gaussians
        return {
            "means": [own.means],
            "sh_dc": [own.sh_dc],
            "sh_rest": [own.sh_rest],
            "opacity": [own.opacity_logits],
            "scale": [own.log_scales],
            "rotation": [own.quats],
            **self.dynamics.parameter_roles(),
        }

    def optimizer_groups(self, learning_rates: Mapping[str, float]) -> list[dict]:
        """Returns groups of the optimizer, one for each role, with ``params``, ``lr`` and ``name``.

        Args:
            learning_rates: by role: ``means``, ``sh_dc``, ``sh_rest``, ``opacity``, ``scale``, ``rotation``; also
                ``grid`` and ``deformation``, or ``time`` and ``velocity``.

        Raises:
            ValueError: for a missing role, or one that the dynamics lack.
        """
        roles = self.parameter_roles()
        if roles.keys() != learning_rates.keys():
            raise ValueError(
                f"learning_rates has the keys {', '.join(learning_rates)}: {type(self.dynamics).__name__} requires "
                f"{', '.join(roles)}."
            )
        return [{"params": params, "lr": learning_rates[role], "name": role} for role, params in roles.items()]


def render(
    gaussians: Gaussians,
    camera: Camera,
    background: Tensor | None = None,
    sh_degree: int | None = None,
    backend: str | None = None,
) -> Rasterized:
    """Renders Gaussians at one time, or at one time for each camera; see :meth:`GaussianSplatting4D.render`."""
    means, scales, quats, opacities, harmonics = gaussians
    degree = gaussians.sh_degree if sh_degree is None else min(sh_degree, gaussians.sh_degree)
    return rasterize(
        means, scales, quats, opacities, harmonics, camera.intrinsics.to(means), camera.world_to_camera.to(means),
        camera.image_size, None if background is None else background.to(means), degree,
        backend=backend,  # type: ignore[arg-type]
    )  # fmt: skip
