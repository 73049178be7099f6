"""Constants of the image formation, and the tensors that the backends share.

Shapes: C cameras, N Gaussians, F channels, H x W pixels.
"""

from typing import NamedTuple

from torch import Tensor

DILATION = 0.3  # px², added to the diagonal of the screen-space covariance
FIELD_MARGIN = 0.3  # tangents beyond the image at which the Jacobian is clamped, as a fraction of tan(fov / 2)
MAX_ALPHA = 0.99
MIN_ALPHA = 1 / 255  # a smaller alpha is skipped
MIN_TRANSMITTANCE = 1e-4  # a pixel ends before the Gaussian that would reduce its transmittance below this value


class Projected(NamedTuple):
    """Gaussians in the pixel coordinates of each camera."""

    means2d: Tensor  # (C, N, 2): x, y in pixels; the center of pixel (row i, column j) is (j + 0.5, i + 0.5)
    conics: Tensor  # (C, N, 3): xx, xy and yy of the inverse covariance
    depths: Tensor  # (C, N): along the optical axis
    extents: Tensor  # (C, N, 2): half width and half height of the region with alpha ≥ MIN_ALPHA; 0 if culled


class Splats(NamedTuple):
    """Gaussians of each camera with the features to blend. The last two tensors have no gradient."""

    means2d: Tensor  # (C, N, 2)
    conics: Tensor  # (C, N, 3)
    opacities: Tensor  # (C, N)
    features: Tensor  # (C, N, F)
    depths: Tensor  # (C, N), the order of compositing
    extents: Tensor  # (C, N, 2); Gaussians with extent 0 are skipped
    height: int
    width: int
