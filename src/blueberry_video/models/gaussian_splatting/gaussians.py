"""Canonical Gaussians of a scene: trainable parameters, initialization, and the schedule of the harmonics' degree.

Shapes: N Gaussians, K = (sh_degree + 1)² spherical harmonics, C times.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MAX_DEGREE = 3
HARMONIC_0 = math.sqrt(1 / (4 * math.pi))  # constant harmonic: color = 0.5 + HARMONIC_0 · coefficient
INITIAL_OPACITY = 0.1
NEIGHBORS = 3  # nearest points that set the initial scale
MIN_SPACING = 1e-7**0.5  # of duplicate points


class Gaussians(NamedTuple):
    """3-D Gaussians at one time, or at C times: the arguments of :func:`blueberry_video.ops.rasterize`.

    Tensors that do not depend on time have no dimension C.
    """

    means: Tensor  # (N, 3) or (C, N, 3)
    scales: Tensor  # (N, 3) or (C, N, 3), > 0
    quats: Tensor  # (N, 4) or (C, N, 4): w, x, y, z of any norm
    opacities: Tensor  # (N,) or (C, N), from 0 to 1
    harmonics: Tensor  # (N, K, 3) or (C, N, K, 3)

    @property
    def sh_degree(self) -> int:
        """Degree of the stored spherical harmonics."""
        return math.isqrt(self.harmonics.shape[-2]) - 1


class PerGaussian(nn.Module):
    """Module with parameters and buffers of N rows, one row for each Gaussian.

    Loading a state dict with a different number of rows resizes the module first, so that a checkpoint of a scene that
    was densified loads strictly. Parameters remain the same objects, so that an optimizer keeps its references.
    """

    @property
    def number(self) -> int:
        """N, the number of Gaussians."""
        return len(next(iter(self.rows().values())))

    def rows(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, each with N rows."""
        own = {**self._parameters, **self._buffers}
        return {name: tensor for name, tensor in own.items() if tensor is not None}

    def resize(self, number: int) -> None:
        """Changes the number of Gaussians; the new values are zero and meant to be overwritten by a state dict."""
        for tensor in self.rows().values():
            if len(tensor) != number:
                tensor.data = tensor.data.new_zeros(number, *tensor.shape[1:])
                tensor.grad = None

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        loaded = [state_dict.get(prefix + name) for name in self.rows()]
        numbers = {len(value) for value in loaded if isinstance(value, Tensor) and value.ndim}
        if len(numbers) == 1:  # otherwise the tensors are inconsistent, which the loading below reports
            self.resize(numbers.pop())
        super()._load_from_state_dict(state_dict, prefix, *args)


class CanonicalGaussians(PerGaussian):
    """Trainable parameters of N Gaussians before any motion, in the parameterization of 3D Gaussian Splatting.

    Scales are stored as logarithms, opacities as logits; rotations are quaternions of any norm. The constant harmonic
    is a separate parameter, because it has a different learning rate.

    Args:
        points: (N, 3) positions.
        colors: (N, 3) from 0 to 1; gray if ``None``.
        sh_degree: 0 to 3.

    Raises:
        ValueError: for points or colors of a wrong shape or with values that are not finite, no points, or a degree
            out of range.
    """

    def __init__(self, points: Tensor, colors: Tensor | None = None, sh_degree: int = MAX_DEGREE):
        super().__init__()
        if sh_degree not in range(MAX_DEGREE + 1):
            raise ValueError(f"sh_degree={sh_degree!r} must be an integer from 0 to {MAX_DEGREE}.")
        for name, value in (("points", points), ("colors", colors)):
            if value is not None and (value.ndim != 2 or value.shape[1] != 3 or len(value) != len(points)):
                raise ValueError(f"{name} has shape {tuple(value.shape)}: it must be (N, 3) with one row per point.")
            if value is not None and not value.isfinite().all():
                bad = int((~value.isfinite()).any(1).sum())
                raise ValueError(f"{name} has {bad} rows with NaN or infinite values: remove these points.")
        if not len(points):
            raise ValueError("points has shape (0, 3): a scene requires at least 1 point; use random_points().")
        number, points = len(points), points.float()
        colors = torch.full_like(points, 0.5) if colors is None else colors.to(points)
        spacing = nearest_spacing(points).clamp(min=MIN_SPACING)
        self.means = nn.Parameter(points.clone())
        self.log_scales = nn.Parameter(spacing.log()[:, None].repeat(1, 3))
        self.quats = nn.Parameter(points.new_tensor([1.0, 0, 0, 0]).repeat(number, 1))
        self.opacity_logits = nn.Parameter(torch.full_like(spacing, math.log(INITIAL_OPACITY / (1 - INITIAL_OPACITY))))
        self.sh_dc = nn.Parameter((colors[:, None] - 0.5) / HARMONIC_0)
        self.sh_rest = nn.Parameter(points.new_zeros(number, (sh_degree + 1) ** 2 - 1, 3))

    @property
    def harmonics(self) -> Tensor:
        """Coefficients of the spherical harmonics (N, K, 3)."""
        return torch.cat([self.sh_dc, self.sh_rest], 1)

    def forward(self) -> Gaussians:
        """Returns the Gaussians without any motion."""
        return activate(self.means, self.log_scales, self.quats, self.opacity_logits, self.harmonics)


def activate(means: Tensor, log_scales: Tensor, quats: Tensor, opacity_logits: Tensor, harmonics: Tensor) -> Gaussians:
    """Returns the Gaussians of stored parameters."""
    return Gaussians(means, log_scales.exp(), quats, opacity_logits.sigmoid(), harmonics)


def random_points(
    number: int, bounds: float | Sequence[Sequence[float]] = 1.3, generator: torch.Generator | None = None
) -> Tensor:
    """Draws (number, 3) positions uniformly from a box; see :func:`box_corners`."""
    if number < 1:
        raise ValueError(f"number={number} must be at least 1.")
    low, high = box_corners(bounds)
    return low + (high - low) * torch.rand(number, 3, generator=generator, device="cpu")  # also on the meta device


def box_corners(bounds: float | Sequence[Sequence[float]]) -> Tensor:
    """Corners (2, 3) of a box: half the side of a cube around the origin, or (low, high) of three coordinates each."""
    corners = [[-bounds] * 3, [bounds] * 3] if isinstance(bounds, int | float) else bounds
    values = torch.tensor([list(corner) for corner in corners], dtype=torch.float32, device="cpu")
    if values.shape != (2, 3) or not (values[0] < values[1]).all() or not values.isfinite().all():
        raise ValueError(f"bounds={bounds} must be a number > 0, or two corners (low, high) with low < high.")
    return values


def nearest_spacing(points: Tensor, max_distances: int = 2**24) -> Tensor:
    """Root mean square distance (N,) of each point to its three nearest neighbors; 1 for a single point.

    At most ``max_distances`` distances, and those of one point, are in memory at once.
    """
    if len(points) == 1:
        return points.new_ones(1)
    neighbors = min(NEIGHBORS, len(points) - 1)
    found = []
    for part in points.split(max(1, max_distances // len(points))):
        distances = torch.cdist(part, points, compute_mode="donot_use_mm_for_euclid_dist")
        found.append(distances.topk(neighbors + 1, largest=False).values[:, 1:])  # the first one is the point itself
    return torch.cat(found).square().mean(1).sqrt()


def degree_at(step: int, interval: int = 1000, max_degree: int = MAX_DEGREE) -> int:
    """Degree of the spherical harmonics at a step: starts at 0 and increases by 1 every ``interval`` steps."""
    return min(step // interval, max_degree)
