"""Dense reference of the rasterizer: every Gaussian at every pixel, as the formulas are written, with autograd."""

import torch
from torch import Tensor

from blueberry_video.ops.rasterizer.inputs import (
    DILATION,
    FIELD_MARGIN,
    MAX_ALPHA,
    MIN_ALPHA,
    MIN_TRANSMITTANCE,
    Projected,
    Splats,
)


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
    """As :func:`blueberry_video.ops.rasterizer.projection.project`: Σ' = J W Σ Wᵀ Jᵀ + 0.3 I with Σ = R S Sᵀ Rᵀ."""
    w, x, y, z = (quats / quats.norm(dim=-1, keepdim=True)).unbind(-1)
    zero = torch.zeros_like(w)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    rotation = torch.eye(3).to(skew) + 2 * (w[..., None, None] * skew + skew @ skew)
    scaled = rotation @ torch.diag_embed(scales)
    covariance = scaled @ scaled.mT

    homogeneous = torch.cat([means, torch.ones_like(means[..., :1])], -1)
    camera = torch.einsum("cij,cnj->cni", world_to_camera, homogeneous.expand(len(world_to_camera), -1, -1))
    depths = camera[..., 2]
    visible = (depths > near) & (opacities >= MIN_ALPHA)
    camera = torch.where((depths > near)[..., None], camera, 1)
    focals, centers = intrinsics.diagonal(dim1=-2, dim2=-1)[:, None, :2], intrinsics[:, None, :2, 2]
    means2d = focals * camera[..., :2] / camera[..., 2:3] + centers

    jacobian = torch.zeros(*depths.shape, 2, 3).to(camera)
    for axis, pixels in enumerate((width, height)):
        focal, center = intrinsics[:, axis, axis, None], intrinsics[:, axis, 2, None]
        margin = FIELD_MARGIN * pixels / 2
        low, high = -(center + margin) / focal, (pixels - center + margin) / focal
        tangent = torch.minimum(torch.maximum(camera[..., axis] / camera[..., 2], low), high)
        jacobian[..., axis, axis] = focal / camera[..., 2]
        jacobian[..., axis, 2] = -focal * tangent / camera[..., 2]
    linear = jacobian @ world_to_camera[:, None, :3, :3]
    covariance = linear @ covariance @ linear.mT + DILATION * torch.eye(2).to(linear)
    inverse = torch.linalg.inv(covariance)
    conics = torch.stack([inverse[..., 0, 0], inverse[..., 0, 1], inverse[..., 1, 1]], -1)

    variances = covariance.diagonal(dim1=-2, dim2=-1)
    half = (2 * (255 * opacities.clamp(min=MIN_ALPHA)).log()[..., None] * variances).sqrt()
    size = torch.tensor([width, height], device=means.device)
    visible = visible & ((means2d + half > 0.5) & (means2d - half < size - 0.5)).all(-1)
    return Projected(means2d, conics, depths, (half * visible[..., None]).detach())


def composite(splats: Splats) -> tuple[Tensor, Tensor]:
    """Blends from front to back.

    Returns:
        Sum of the features (C, F, H, W), weighted by alpha and the transmittance before, and the transmittance after
        all Gaussians (C, H, W).
    """
    y, x = torch.meshgrid(torch.arange(splats.height) + 0.5, torch.arange(splats.width) + 0.5, indexing="ij")
    pixels = torch.stack([x, y], -1).reshape(-1, 2).to(splats.means2d)
    images, transmittances = [], []
    for camera in range(len(splats.depths)):
        means2d, conics, opacities = splats.means2d[camera], splats.conics[camera], splats.opacities[camera]
        features, depths, extents = splats.features[camera], splats.depths[camera], splats.extents[camera]
        order = depths.argsort(stable=True)
        order = order[extents[order, 0] > 0]
        dx, dy = (pixels[:, None] - means2d[order]).unbind(-1)  # (H W, n)
        xx, xy, yy = conics[order].unbind(-1)
        alpha = opacities[order] * torch.exp(-(xx * dx * dx + yy * dy * dy) / 2 - xy * dx * dy)
        alpha = torch.where(alpha < MAX_ALPHA, alpha, MAX_ALPHA)
        alpha = torch.where(alpha >= MIN_ALPHA, alpha, 0)
        after = torch.cumprod(1 - alpha, 1)
        before = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], 1)[:, : after.shape[1]]
        weight = torch.where(after >= MIN_TRANSMITTANCE, alpha * before, 0)
        images.append((weight @ features[order]).T.unflatten(1, (splats.height, splats.width)))
        transmittances.append(1 - weight.sum(1).view(splats.height, splats.width))
    return torch.stack(images), torch.stack(transmittances)
