"""Projection of 3-D Gaussians to the image (EWA splatting), and color from spherical harmonics.

Shapes: C cameras, N Gaussians; a tensor of Gaussians is (C or 1, N, …).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.ops.rasterizer.inputs import DILATION, FIELD_MARGIN, MIN_ALPHA, Projected


def project(
    means: Tensor,
    scales: Tensor,
    quats: Tensor,
    opacities: Tensor,
    intrinsics: Tensor,
    world_to_camera: Tensor,
    height: int,
    width: int,
    near: float,
) -> Projected:
    """Projects Gaussians by the first-order approximation of the pinhole camera at their means.

    The Jacobian is evaluated at a tangent clamped to the image and a margin: far outside, the approximation diverges.

    Args:
        means: (C or 1, N, 3) in world coordinates.
        scales: (C or 1, N, 3) standard deviations.
        quats: (C or 1, N, 4) rotations (w, x, y, z) of any norm > 0.
        opacities: (C or 1, N).
        intrinsics: (C, 3, 3).
        world_to_camera: (C, 4, 4).
        near: Gaussians at this depth or closer are culled.
    """
    turn = world_to_camera[:, :3, :3]
    x, y, depths = (means @ turn.mT + world_to_camera[:, None, :3, 3]).unbind(-1)
    in_front = depths > near
    inverse = torch.where(in_front, depths, 1).reciprocal()  # no division by 0: culled Gaussians have finite gradients
    x, y = x * inverse, y * inverse
    focal_x, focal_y, center_x, center_y = lens(intrinsics)
    means2d = torch.stack([focal_x * x + center_x, focal_y * y + center_y], -1)

    # Rows of Jacobian times world-to-camera rotation times Gaussian: its product with its transpose is the covariance.
    x, y = clamp_tangent(x, focal_x, center_x, width), clamp_tangent(y, focal_y, center_y, height)
    right, down, forward = (row[:, None] for row in turn.unbind(1))  # (C, 1, 3)
    axes = rotations(quats) * scales[..., None, :]  # (C or 1, N, 3, 3): columns are the scaled axes
    rows = torch.stack([right - x[..., None] * forward, down - y[..., None] * forward], -2)  # (C, N, 2, 3)
    rows = torch.stack([focal_x * inverse, focal_y * inverse], -1)[..., None] * rows @ axes
    across, along = rows.unbind(-2)
    xx, xy, yy = (across * across).sum(-1), (across * along).sum(-1), (along * along).sum(-1)
    # The determinant as a sum of squares: xx·yy - xy² would cancel for long, thin Gaussians.
    minors = torch.linalg.cross(across, along)
    determinant = (minors * minors).sum(-1) + DILATION * (xx + yy) + DILATION**2
    conics = torch.stack([yy + DILATION, -xy, xx + DILATION], -1) / determinant[..., None]
    return Projected(means2d, conics, depths, extents(means2d, xx, yy, opacities, in_front, height, width))


def lens(intrinsics: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Focal lengths and principal point in x and y, each (C, 1)."""
    return intrinsics[:, 0, 0, None], intrinsics[:, 1, 1, None], intrinsics[:, 0, 2, None], intrinsics[:, 1, 2, None]


def clamp_tangent(tangent: Tensor, focal: Tensor, center: Tensor, size: int) -> Tensor:
    """Clamps to the image and a margin; with a centered principal point, to 1.3 tan(fov / 2) on both sides."""
    margin = FIELD_MARGIN * 0.5 * size
    return tangent.clamp(-(center + margin) / focal, (size - center + margin) / focal)


def rotations(quats: Tensor) -> Tensor:
    """Rotation matrices (…, 3, 3) of quaternions (…, 4) in the order w, x, y, z, which are normalized."""
    w, x, y, z = F.normalize(quats, dim=-1).unbind(-1)
    entries = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(entries, -1).unflatten(-1, (3, 3))


@torch.no_grad()
def extents(
    means2d: Tensor, xx: Tensor, yy: Tensor, opacities: Tensor, in_front: Tensor, height: int, width: int
) -> Tensor:
    """Half width and half height (C, N, 2) of the ellipse with alpha ≥ MIN_ALPHA; 0 if it contains no pixel center.

    ``xx`` and ``yy`` are variances without the dilation.
    """
    reach = 2 * (opacities / MIN_ALPHA).log().clamp(min=0)
    half = (reach[..., None] * (torch.stack([xx, yy], -1) + DILATION)).sqrt()
    (low_x, low_y), (high_x, high_y) = (means2d - half).unbind(-1), (means2d + half).unbind(-1)
    inside = (high_x > 0.5) & (low_x < width - 0.5) & (high_y > 0.5) & (low_y < height - 0.5)
    return half * (inside & in_front & (opacities >= MIN_ALPHA))[..., None]


def harmonics_color(coefficients: Tensor, directions: Tensor, degree: int) -> Tensor:
    """Color max(0, 0.5 + Σ coefficient · harmonic) of unit viewing directions.

    Args:
        coefficients: (C or 1, N, K, D) with K ≥ (degree + 1)²; further coefficients are ignored.
        directions: (C, N, 3), from the camera to the Gaussian.
    """
    basis = harmonics(directions, degree)
    if coefficients.shape[0] == 1:
        color = torch.einsum("cnk,nkd->cnd", basis, coefficients[0, :, : basis.shape[-1]])
    else:
        color = (basis[..., None] * coefficients[:, :, : basis.shape[-1]]).sum(-2)
    return (color + 0.5).clamp(min=0)


def harmonics(directions: Tensor, degree: int) -> Tensor:
    """Real spherical harmonics (…, (degree + 1)²) up to degree 3, ordered by degree l, then by order m from -l to l.

    Their signs include the Condon-Shortley phase, as in published Gaussian scenes: the harmonics of degree 1 are
    proportional to -y, z and -x.
    """
    x, y, z = directions.unbind(-1)
    values = [torch.full_like(x, math.sqrt(1 / (4 * math.pi)))]
    if degree >= 1:
        first = math.sqrt(3 / (4 * math.pi))
        values += [-first * y, first * z, -first * x]
    if degree >= 2:
        square = x * x - y * y
        second = math.sqrt(15 / (4 * math.pi))
        values += [
            second * (x * y),
            -second * (y * z),
            math.sqrt(5 / (16 * math.pi)) * (3 * z * z - 1),
            -second * (x * z),
            second / 2 * square,
        ]
    if degree >= 3:
        outer, middle, inner = (math.sqrt(k / math.pi) for k in (35 / 32, 105 / 4, 21 / 32))
        zz = 5 * z * z
        values += [
            -outer * y * (3 * x * x - y * y),
            middle * (x * y) * z,
            -inner * y * (zz - 1),
            math.sqrt(7 / (16 * math.pi)) * z * (zz - 3),
            -inner * x * (zz - 1),
            middle / 2 * square * z,
            -outer * x * (x * x - 3 * y * y),
        ]
    return torch.stack(values, -1)
