"""Adaptive density control: clones, splits and prunes Gaussians during training; the optimizer state follows.

Shapes: N Gaussians before, M after; C cameras.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from blueberry_video.models.gaussian_splatting.dynamics import Native
from blueberry_video.models.gaussian_splatting.gaussians import PerGaussian
from blueberry_video.models.gaussian_splatting.model import GaussianSplatting4D
from blueberry_video.ops import Rasterized
from blueberry_video.ops.rasterizer.projection import rotations

CHILDREN = 2  # Gaussians that replace one that is split


@dataclass(frozen=True)
class Densification:
    """Settings of the density control; the defaults are those of 4D-GS for D-NeRF scenes.

    Attributes:
        start, stop, interval: densifies every ``interval`` steps after ``start``, and before ``stop``.
        gradient_threshold: least mean norm of the gradient of the position in normalized device coordinates.
        max_clone_scale: largest scale of a Gaussian that is cloned, as a fraction of the extent of the scene; larger
            ones are split.
        split_factor: scales of the two children are those of the parent divided by this.
        split_time: with native dynamics, also samples the time centers of children, and divides their durations.
        min_opacity: Gaussians with a lower opacity are pruned.
        max_scale: Gaussians with a larger scale are pruned after the first opacity reset, as a fraction of the extent.
        max_radius: Gaussians with a larger radius in pixels are pruned after the first opacity reset. ``None`` for no
            limit: the published limit of 20 is for images of 800 pixels, and is compared to radii that were set to 0.
        reset_interval, reset_opacity: every ``reset_interval`` steps before ``stop``, opacities are limited to this
            value.
        max_gaussians: limit of N; the Gaussians with the largest gradients are densified first.

    Raises:
        ValueError: for a value out of range.
    """

    start: int = 500
    stop: int = 10_000
    interval: int = 100
    gradient_threshold: float = 2e-4
    max_clone_scale: float = 0.01
    split_factor: float = 1.6
    split_time: bool = False
    min_opacity: float = 0.005
    max_scale: float = 0.1
    max_radius: float | None = None
    reset_interval: int = 3000
    reset_opacity: float = 0.01
    max_gaussians: int = 360_000

    def __post_init__(self) -> None:
        for key in ("interval", "reset_interval", "max_gaussians"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1.")
        for key in ("gradient_threshold", "max_clone_scale", "max_scale"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key}={getattr(self, key)} must be above 0.")
        if not self.split_factor > 1:
            raise ValueError(f"split_factor={self.split_factor} must be above 1, such as 1.6.")
        if not 0 <= self.min_opacity < self.reset_opacity < 1:
            raise ValueError(
                f"min_opacity={self.min_opacity} must be ≥ 0 and below reset_opacity={self.reset_opacity}, which "
                "must be below 1: otherwise every Gaussian is pruned after a reset."
            )

    def densifies_at(self, step: int) -> bool:
        """True if Gaussians are densified and pruned after ``step`` optimizer steps."""
        return self.start < step < self.stop and step % self.interval == 0

    def resets_at(self, step: int) -> bool:
        """True if opacities are reset after ``step`` optimizer steps."""
        return 0 < step < self.stop and step % self.reset_interval == 0

    def prunes_large_at(self, step: int) -> bool:
        """True if the limits ``max_scale`` and ``max_radius`` apply after ``step`` optimizer steps."""
        return step > self.reset_interval


class Counts(NamedTuple):
    """Numbers of Gaussians that a call of :func:`densify` changed."""

    cloned: int
    split: int
    pruned: int


class Statistics(PerGaussian):
    """Gradients and radii of each Gaussian since the last densification; a part of the checkpoint."""

    gradient_sum: Tensor
    views: Tensor
    max_radius: Tensor

    def __init__(self, number: int):
        super().__init__()
        self.register_buffer("gradient_sum", torch.zeros(number))  # of norms, in normalized device coordinates
        self.register_buffer("views", torch.zeros(number, dtype=torch.int64))  # images in which it is visible
        self.register_buffer("max_radius", torch.zeros(number, dtype=torch.int32))  # pixels

    @property
    def mean_gradient(self) -> Tensor:
        """Mean norm (N,) over the images in which a Gaussian is visible; 0 if there are none."""
        return self.gradient_sum / self.views.clamp(min=1)

    @torch.no_grad()
    def update(self, rendered: Rasterized) -> None:
        """Adds the gradients of the positions in the image; call after ``backward``.

        The loss must be a mean over the C cameras: gradients are multiplied by C.

        Raises:
            ValueError: if ``rendered.means2d`` has no gradient, or belongs to another number of Gaussians.
        """
        gradient, radii = rendered.means2d.grad, rendered.radii
        if gradient is None:
            raise ValueError(
                "rendered.means2d.grad is None: render with gradients and call backward() before update()."
            )
        gradient, radii = gradient.reshape(-1, *gradient.shape[-2:]), radii.reshape(-1, radii.shape[-1])
        if gradient.shape[1] != self.number:
            raise ValueError(
                f"rendered has {gradient.shape[1]} Gaussians and the statistics {self.number}: densify both together."
            )
        height, width = rendered.alpha.shape[-2:]
        half_size = torch.tensor([width / 2, height / 2]).to(gradient)
        norms = (gradient * half_size * len(gradient)).norm(dim=-1)
        visible = radii > 0
        self.gradient_sum += torch.where(visible, norms, 0).sum(0)
        self.views += visible.sum(0)
        torch.maximum(self.max_radius, radii.amax(0), out=self.max_radius)

    def reset(self) -> None:
        """Sets all statistics to zero."""
        for tensor in self.rows().values():
            tensor.zero_()


@torch.no_grad()
def densify(
    model: GaussianSplatting4D,
    statistics: Statistics,
    settings: Densification,
    extent: float,
    optimizer: torch.optim.Optimizer | None = None,
    generator: torch.Generator | None = None,
    prune_large: bool = False,
) -> Counts:
    """Clones and splits Gaussians with large gradients, prunes the invisible, and resets the statistics.

    A clone is a copy. The children of a split are drawn from the Gaussian that they replace. The order is: Gaussians
    that remain, clones, children. Parameters are replaced, in the groups of the optimizer too; its state of remaining
    Gaussians is kept and that of new ones is zero. Call it when gradients are not needed any more.

    Args:
        extent: size of the scene, see :func:`camera_extent`.
        optimizer: optimizer of the parameters of ``model``.
        generator: CPU generator of the positions of children.
        prune_large: see :meth:`Densification.prunes_large_at`.

    Raises:
        ValueError: if all Gaussians would be pruned.
    """
    modules = nn.ModuleList([model, statistics])
    clones, splits = select(statistics.mean_gradient, model.gaussians.log_scales.exp(), settings, extent)
    if len(clones) or len(splits):
        remaining = torch.ones(model.number, dtype=torch.bool, device=clones.device)
        remaining[splits] = False
        kept = remaining.nonzero()[:, 0]
        parents = splits.repeat(CHILDREN)
        children = children_of(model, parents, settings, generator)
        replace_rows(modules, torch.cat([kept, clones, parents]), len(kept), optimizer)
        for (module, name), values in children.items():
            module.rows()[name][-len(parents) :] = values
        for tensor in statistics.rows().values():
            tensor[len(kept) :] = 0
    scales, opacities = model.gaussians.log_scales.exp(), model.gaussians.opacity_logits.sigmoid()
    # Comparisons are written such that NaN is pruned.
    keep = opacities >= settings.min_opacity
    if prune_large:
        keep &= scales.amax(1) <= settings.max_scale * extent
        if settings.max_radius is not None:
            keep &= statistics.max_radius <= settings.max_radius
    pruned = int((~keep).sum())
    if pruned == len(keep):
        raise ValueError(
            f"all {pruned} Gaussians would be pruned: their largest opacity is {opacities.max():.3g} and "
            f"min_opacity={settings.min_opacity}; extent={extent:.3g}, max_scale={settings.max_scale}. Check the poses "
            "of the cameras, and lower the learning rates or min_opacity."
        )
    if pruned:
        source = keep.nonzero()[:, 0]
        replace_rows(modules, source, len(source), optimizer)
    statistics.reset()
    return Counts(len(clones), len(splits), pruned)


def select(mean_gradient: Tensor, scales: Tensor, settings: Densification, extent: float) -> tuple[Tensor, Tensor]:
    """Returns the indices of Gaussians to clone and to split, ascending.

    Args:
        mean_gradient: (N,).
        scales: (N, 3).
    """
    chosen = mean_gradient >= settings.gradient_threshold
    budget = max(settings.max_gaussians - len(chosen), 0)  # a clone and a split both add one
    if chosen.sum() > budget:
        order = torch.where(chosen, mean_gradient, -1).argsort(descending=True, stable=True)
        chosen[order[budget:]] = False
    small = scales.amax(1) <= settings.max_clone_scale * extent
    return (chosen & small).nonzero()[:, 0], (chosen & ~small).nonzero()[:, 0]


def children_of(
    model: GaussianSplatting4D, parents: Tensor, settings: Densification, generator: torch.Generator | None = None
) -> Mapping[tuple[PerGaussian, str], Tensor]:
    """Returns the values in which children differ from their parents (P,), by module and name."""
    own, dynamics = model.gaussians, model.dynamics
    shrinkage = math.log(settings.split_factor)
    scales = own.log_scales[parents].exp()
    offsets = torch.randn(len(parents), 3, generator=generator).to(scales) * scales
    means = own.means[parents] + (rotations(own.quats[parents]) @ offsets[..., None])[..., 0]
    found: dict[tuple[PerGaussian, str], Tensor] = {(own, "log_scales"): own.log_scales[parents] - shrinkage}
    if isinstance(dynamics, Native) and settings.split_time:
        moving = ~dynamics.is_static[parents]
        durations = dynamics.log_durations[parents]
        shift = torch.randn(len(parents), generator=generator).to(durations) * durations.exp() * moving
        means = means + dynamics.velocities[parents] * shift[:, None]
        found[dynamics, "time_means"] = dynamics.time_means[parents] + shift
        found[dynamics, "log_durations"] = durations - shrinkage * moving
    found[own, "means"] = means
    return found


@torch.no_grad()
def replace_rows(modules: nn.Module, source: Tensor, kept: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Replaces the rows of every per-Gaussian parameter and buffer by copies of the rows ``source`` (M,).

    Parameters become new objects, which replace the previous ones in the groups of the optimizer. Its state is copied
    in the same way, and is zero from row ``kept`` on.
    """
    for module in per_gaussian_modules(modules):
        for name, tensor in module.rows().items():
            rows = tensor.detach()[source]
            if isinstance(tensor, nn.Parameter):
                parameter = nn.Parameter(rows, requires_grad=tensor.requires_grad)
                setattr(module, name, parameter)
                if optimizer is not None:
                    _replace_in_optimizer(optimizer, tensor, parameter, source, kept)
            else:
                setattr(module, name, rows)


def _replace_in_optimizer(
    optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, source: Tensor, kept: int
) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if old not in optimizer.state:
        return
    state = optimizer.state.pop(old)
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == old.shape:
            state[key] = value[source]
            state[key][kept:] = 0
    optimizer.state[new] = state


def per_gaussian_modules(module: nn.Module) -> Iterator[PerGaussian]:
    """Yields the submodules that have one row for each Gaussian."""
    return (part for part in module.modules() if isinstance(part, PerGaussian))


@torch.no_grad()
def reset_opacities(
    model: GaussianSplatting4D, settings: Densification, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Limits opacities to ``settings.reset_opacity`` and sets the optimizer's moments of them to zero."""
    limit = math.log(settings.reset_opacity / (1 - settings.reset_opacity))
    logits = model.gaussians.opacity_logits
    logits.clamp_(max=limit)
    if optimizer is not None and logits in optimizer.state:
        for value in optimizer.state[logits].values():
            if isinstance(value, Tensor) and value.shape == logits.shape:
                value.zero_()


def camera_extent(poses: Tensor) -> float:
    """Size of a scene: 1.1 times the largest distance of a camera (…, 4, 4) to the mean of all camera centers.

    Raises:
        ValueError: if all cameras have the same center.
    """
    centers = poses.reshape(-1, 4, 4)[:, :3, 3].double()
    extent = 1.1 * (centers - centers.mean(0)).norm(dim=-1).max().item()
    if not extent > 0:
        raise ValueError(f"extent={extent}: the {len(centers)} cameras have the same center; pass a size of the scene.")
    return extent
