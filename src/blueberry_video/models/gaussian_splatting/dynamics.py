"""Dynamics of a scene: interface, the static scene, and native 4-D Gaussians.

Shapes: N Gaussians, T times.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from blueberry_video.models.gaussian_splatting.gaussians import CanonicalGaussians, Gaussians, PerGaussian


class Dynamics(nn.Module, ABC):
    """Base class of dynamics: maps canonical Gaussians and times to the Gaussians at these times."""

    def reset(self, canonical: CanonicalGaussians, generator: torch.Generator | None = None) -> None:
        """Initializes the parameters that belong to single Gaussians; called when the canonical ones are created."""

    @abstractmethod
    def forward(self, canonical: CanonicalGaussians, times: Tensor) -> Gaussians:
        """Returns the Gaussians at times (T,) in [0, 1]; tensors that depend on time have a leading dimension T."""

    def after_densification(self, canonical: CanonicalGaussians) -> None:
        """Called after each densification of the second stage."""

    def losses(self) -> dict[str, Tensor]:
        """Regularization losses by name; empty by default."""
        return {}

    def parameter_roles(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by role; a role is a group of the optimizer with a separate learning rate."""
        return {}


class Static(Dynamics):
    """No motion: the baseline, and the first stage of training."""

    def forward(self, canonical: CanonicalGaussians, times: Tensor) -> Gaussians:
        return canonical()


class Native(PerGaussian, Dynamics):
    """4-D Gaussians with an extent in time and a velocity, partly static (arXiv 2310.10642, 2505.13215).

    A 4-D Gaussian is stored as the conditional distribution over space at the time t, with a covariance that does not
    depend on t, and the marginal distribution over time: its mean is at ``mean + velocity · (t - time_mean)`` and its
    opacity is multiplied by ``exp(-(t - time_mean)² / (2 duration²))``. Static Gaussians have a velocity of
    zero and a constant opacity.

    Args:
        initial_durations: shortest and longest standard deviation in time of new Gaussians, drawn log-uniformly; the
            time span of a scene is 1. Long ones become what does not move, short ones what does.
        all_time_centers: initial time centers are uniform in [0, 1]; otherwise all are 0.5.
        static_duration: Gaussians with a duration of at least this become static after each densification; ``None``:
            none does.

    Raises:
        ValueError: for ``initial_durations`` that are not ascending and above 0.
    """

    is_static: Tensor

    def __init__(
        self,
        initial_durations: Sequence[float] = (0.15, 2.0),
        all_time_centers: bool = True,
        static_duration: float | None = 3.0,
    ):
        super().__init__()
        if static_duration is not None and not static_duration > 0:
            raise ValueError(f"static_duration={static_duration} must be above 0, or null.")
        if len(initial_durations) != 2 or not 0 < initial_durations[0] <= initial_durations[1] < math.inf:
            raise ValueError(
                f"initial_durations={list(initial_durations)} must be the shortest and the longest, above 0, such as "
                "[0.15, 2.0]; the span of a scene is 1."
            )
        self.initial_durations, self.all_time_centers = tuple(initial_durations), all_time_centers
        self.static_duration = static_duration
        self.time_means = nn.Parameter(torch.zeros(0))
        self.log_durations = nn.Parameter(torch.zeros(0))
        self.velocities = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("is_static", torch.zeros(0, dtype=torch.bool))

    def reset(self, canonical: CanonicalGaussians, generator: torch.Generator | None = None) -> None:
        """Draws time centers and durations; velocities start at zero and no Gaussian is static."""
        self.to_empty(device=canonical.means.device)
        self.resize(canonical.number)
        with torch.no_grad():
            if self.all_time_centers:
                self.time_means.copy_(torch.rand(canonical.number, generator=generator, device="cpu"))
            else:
                self.time_means.fill_(0.5)
            low, high = (math.log(duration) for duration in self.initial_durations)
            self.log_durations.copy_(
                low + (high - low) * torch.rand(canonical.number, generator=generator, device="cpu")
            )
            self.velocities.zero_()
            self.is_static.zero_()

    def forward(self, canonical: CanonicalGaussians, times: Tensor) -> Gaussians:
        base = canonical()
        elapsed = times.to(self.time_means)[:, None] - self.time_means  # (T, N)
        elapsed = torch.where(self.is_static, 0, elapsed)
        marginal = torch.exp(-0.5 * (elapsed * (-self.log_durations).exp()).square())
        means = base.means + self.velocities * elapsed[..., None]
        return base._replace(means=means, opacities=base.opacities * marginal)

    def losses(self) -> dict[str, Tensor]:
        """``speed``: mean of the L1 norms of the velocities, in units of space per time span.

        Adam moves a velocity by the same amount for a small gradient as for a large one: without this loss, the
        velocities of static Gaussians follow the noise of single views.
        """
        return {"speed": self.velocities.abs().sum(-1).mean()}

    def after_densification(self, canonical: CanonicalGaussians) -> None:
        if self.static_duration is not None:
            self.mark_static(canonical, self.static_duration)

    @torch.no_grad()
    def mark_static(self, canonical: CanonicalGaussians, min_duration: float = 1.0) -> int:
        """Marks Gaussians with a duration of at least ``min_duration`` as static, at their positions at the time 0.5.

        Returns:
            Number of Gaussians that were not static before.
        """
        changed = ~self.is_static & (self.log_durations >= math.log(min_duration))
        shift = self.velocities * (0.5 - self.time_means)[:, None]
        canonical.means.add_(torch.where(changed[:, None], shift, 0))
        self.velocities.masked_fill_(changed[:, None], 0)
        self.is_static |= changed
        return int(changed.sum())

    def parameter_roles(self) -> dict[str, list[nn.Parameter]]:
        return {"time": [self.time_means, self.log_durations], "velocity": [self.velocities]}
