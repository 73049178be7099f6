"""HexPlane field: features of a position and a time from six planes (arXiv 2301.09632, 2310.08528).

Shapes: N positions, T times, F features per scale, S scales.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blueberry_video.models.gaussian_splatting.gaussians import box_corners

AXES = "xyzt"
PLANES = tuple(first + second for first, second in combinations(AXES, 2))  # xy, xz, xt, yz, yt, zt
SPATIAL, TEMPORAL = ("xy", "xz", "yz"), ("xt", "yt", "zt")


class HexPlane(nn.Module):
    """Six planes over pairs of the axes x, y, z, t at several resolutions, read with bilinear interpolation.

    The features of a scale are the product over its six planes; scales are concatenated. Positions outside the bounds
    are clamped to them. Spatial planes start from U(0.1, 0.5) and time planes from 1, so that the field is constant in
    time at first.

    Args:
        features: F, at each scale.
        resolution: cells along x, y, z and t, each at least 2; the original uses half the number of frames for t.
        scales: factors of the spatial resolution, one for each scale; the time axis has the same resolution in all.
        bounds: half side of a cube around the origin, or its corners (low, high) of three coordinates each.
        full_time_range: maps times from [0, 1] to the whole time axis. False as in the published code, where they are
            used as coordinates in [-1, 1] and one half of every time plane is never read.
        smooth_both_axes: ``losses`` measures the smoothness of spatial planes along both axes. False as in the
            published code: only along the second axis in the name of a plane.

    Raises:
        ValueError: for arguments out of range.
    """

    bounds: Tensor

    def __init__(
        self,
        features: int = 32,
        resolution: Sequence[int] = (64, 64, 64, 25),
        scales: Sequence[int] = (1, 2),
        bounds: float | Sequence[Sequence[float]] = 1.6,
        full_time_range: bool = True,
        smooth_both_axes: bool = True,
    ):
        super().__init__()
        if features < 1:
            raise ValueError(f"features={features} must be at least 1.")
        if len(resolution) != 4 or min(resolution) < 2:
            raise ValueError(f"resolution={list(resolution)} must be four integers ≥ 2: cells along x, y, z and t.")
        if not scales or min(scales) < 1:
            raise ValueError(f"scales={list(scales)} must be at least one integer ≥ 1, such as [1, 2].")
        self.features, self.scales = features, tuple(scales)
        self.full_time_range, self.smooth_both_axes = full_time_range, smooth_both_axes
        self.register_buffer("bounds", torch.zeros(2, 3))
        self.set_bounds(bounds)
        self.planes = nn.ModuleList()
        for scale in self.scales:
            cells = [scale * cells for cells in resolution[:3]] + [resolution[3]]
            shapes = {plane: (features, *(cells[AXES.index(axis)] for axis in reversed(plane))) for plane in PLANES}
            planes = {
                plane: torch.ones(shape) if plane in TEMPORAL else torch.empty(shape).uniform_(0.1, 0.5)
                for plane, shape in shapes.items()
            }
            self.planes.append(nn.ParameterDict(planes))

    @property
    def out_features(self) -> int:
        """Number of features of a position: F · S."""
        return self.features * len(self.scales)

    def set_bounds(self, bounds: float | Sequence[Sequence[float]]) -> None:
        """Sets the region that the planes cover; see ``bounds`` of the constructor."""
        self.bounds.copy_(box_corners(bounds))

    def forward(self, positions: Tensor, times: Tensor) -> Tensor:
        """Returns the features of every position at every time.

        Args:
            positions: (N, 3).
            times: (T,) in [0, 1].

        Returns:
            (T, N, F · S).
        """
        low, high = self.bounds
        x, y, z = (2 * (positions - low) / (high - low) - 1).unbind(-1)
        t = 2 * times - 1 if self.full_time_range else times
        shape = (len(times), len(positions))
        coordinates = {"x": x[None], "y": y[None], "z": z[None], "t": t.to(x)[:, None].expand(shape)}
        found = []
        for planes in self._scales():
            product: Tensor | None = None
            for name in (*SPATIAL, *TEMPORAL):  # the product of spatial planes is shared by all times
                rows = 1 if name in SPATIAL else shape[0]
                grid = torch.stack([coordinates[axis].expand(rows, -1) for axis in name], -1)
                values = F.grid_sample(planes[name][None], grid[None], padding_mode="border", align_corners=True)[0]
                product = values if product is None else product * values
            found.append(product)
        return torch.cat(found).movedim(0, -1)  # type: ignore[arg-type]

    def _scales(self) -> list[nn.ParameterDict]:
        """Planes by name, for each scale."""
        return [cast(nn.ParameterDict, planes) for planes in self.planes]

    def losses(self) -> dict[str, Tensor]:
        """Regularization losses, each summed over the scales and over three planes.

        Returns:
            ``spatial_smoothness`` and ``time_smoothness``: mean squared second difference of the spatial planes, and
            of the time planes along time. ``time_planes``: mean \\|1 - value\\| of the time planes.
        """
        zero = self.bounds.new_zeros(())
        found = {"spatial_smoothness": zero, "time_smoothness": zero, "time_planes": zero}
        for planes in self._scales():
            for name in SPATIAL:
                smoothness = squared_curvature(planes[name], -2)
                if self.smooth_both_axes:
                    smoothness = (smoothness + squared_curvature(planes[name], -1)) / 2
                found["spatial_smoothness"] = found["spatial_smoothness"] + smoothness
            for name in TEMPORAL:
                found["time_smoothness"] = found["time_smoothness"] + squared_curvature(planes[name], -2)
                found["time_planes"] = found["time_planes"] + (1 - planes[name]).abs().mean()
        return found


def squared_curvature(plane: Tensor, dim: int) -> Tensor:
    """Mean squared second difference of a plane along a dimension; 0 if it has fewer than three entries."""
    if plane.shape[dim] < 3:
        return plane.new_zeros(())
    return plane.diff(n=2, dim=dim).square().mean()
