"""Rule-based reader of the object in clips of the procedural world, to check what a generated clip remembers of it.

Floor and sky are gray, so saturated pixels are the object. Nothing is trained; the thresholds are chosen on training
and validation clips of :mod:`blueberry_video.data.memory_world`. Accuracy on 500 test clips, from 4 frames: real, and
degraded to a PSNR of 26 dB by blur and noise, which is the same in all frames:

=======  ============  ============  ============
pixels   colour        size          shape
=======  ============  ============  ============
64 x 64  1.000, 1.000  1.000, 1.000  0.938, 0.914
32 x 32  1.000, 1.000  1.000, 1.000  0.828, 0.798
16 x 16  1.000, 1.000  1.000, 0.998  0.556, 0.564
=======  ============  ============  ============

The chance levels are 1/6, 1/2 and 1/3. Shapes are confused mainly between box and sphere. Clips without an object, or
with one of mixed colours, get -1, not one of the classes, so they score below chance level.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

COLOURS = {  # as in the world
    "red": (0.90, 0.15, 0.12),
    "green": (0.15, 0.75, 0.20),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "magenta": (0.85, 0.15, 0.80),
    "cyan": (0.10, 0.80, 0.85),
}
SHAPES = ("sphere", "box", "cylinder")
SIZES = ("small", "large")
CHANCE = {"colour": 1 / len(COLOURS), "size": 1 / len(SIZES), "shape": 1 / len(SHAPES)}
NONE = -1  # no class

_SATURATION = 0.12  # largest minus smallest channel, in [0, 1]; the darkest side of an object has 0.18
_LEAST_AREA = 0.008  # share of the image; the smallest object covers 0.026
_LEAST_PURITY = 0.7  # length of the mean chroma over the mean length: 1 for one hue, about 0 for noise
_LARGE = 0.283  # root of the area of the mask without its blurred rim, in widths of the image
_TALL = -0.38  # log of the ratio of the variances along x and y; below it is a cylinder
_FLAT = 3.96  # sum of the kurtosis along x and y; an ellipse has 4, and a box less


class Objects(NamedTuple):
    """Objects of N clips.

    Attributes:
        colour, size, shape: long (N,), the index in :data:`COLOURS`, :data:`SIZES` and :data:`SHAPES`, or -1.
        center: float (N, 2), x and y from 0 to 1 of the image; NaN without an object.
        mask: bool (N, H, W), the pixels of the object; false without an object.
    """

    colour: Tensor
    size: Tensor
    shape: Tensor
    center: Tensor
    mask: Tensor


def read_objects(video: Tensor) -> Objects:
    """Reads the object of clips with a static camera.

    Args:
        video: (N, 3, T, H, W) in [-1, 1], of one object at the same position in all frames.

    Raises:
        ValueError: for a tensor of a different shape.
    """
    if video.ndim != 5 or video.shape[1] != 3 or 0 in video.shape[2:]:
        raise ValueError(f"video of shape {tuple(video.shape)} must be (N, 3, T, H, W), with at least one frame.")
    image = ((video.float().clamp(-1, 1) + 1) / 2).mean(2)
    image = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)  # against noise
    mask = image.amax(1) - image.amin(1) > _SATURATION
    chroma = (image - image.mean(1, keepdim=True)) * mask[:, None]
    total = chroma.sum((2, 3))
    purity = total.norm(dim=1) / chroma.norm(dim=1).sum((1, 2)).clamp(min=1e-6)
    albedo = torch.tensor(list(COLOURS.values()), device=video.device)
    hues = F.normalize(albedo - albedo.mean(1, keepdim=True), dim=1)
    found = (mask.float().mean((1, 2)) >= _LEAST_AREA) & (purity >= _LEAST_PURITY)
    center, variance, kurtosis = _moments(mask)
    side = mask.float().mean((1, 2)).sqrt() - 0.6 / video.shape[-1]
    ratio = (variance[:, 0] / variance[:, 1].clamp(min=1e-9)).clamp(min=1e-9).log()
    box = (kurtosis.sum(1) < _FLAT).long()
    return Objects(
        colour=(total @ hues.T).argmax(1).where(found, NONE),
        size=(side > _LARGE).long().where(found, NONE),
        shape=torch.where(ratio < _TALL, SHAPES.index("cylinder"), box).where(found, NONE),
        center=center.where(found[:, None], torch.nan),
        mask=mask & found[:, None, None],
    )


def accuracies(objects: Objects, labels: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns the shares in [0, 1] of clips with the ``colour``, ``size`` and ``shape`` of ``labels`` (N,)."""
    return {
        name: (getattr(objects, name) == labels[name].to(objects.colour.device)).float().mean().item()
        for name in CHANCE
    }


def mask_overlap(objects: Objects, others: Objects) -> float:
    """Returns the mean intersection over union of the masks of two readings of N clips; 0 where both are empty."""
    common = (objects.mask & others.mask).sum((1, 2))
    union = (objects.mask | others.mask).sum((1, 2))
    return (common / union.clamp(min=1)).mean().item()


def _moments(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Center, variances and kurtosis along x and y, each (N, 2), of masks (N, H, W); finite for empty masks."""
    weight = mask.float() / mask.sum((1, 2), keepdim=True).clamp(min=1)
    rows = []
    for profile in (weight.sum(1), weight.sum(2)):
        position = (torch.arange(profile.shape[1], device=mask.device) + 0.5) / profile.shape[1]
        center = (profile * position).sum(1)
        offset = position - center[:, None]
        variance = (profile * offset**2).sum(1)
        rows.append((center, variance, (profile * offset**4).sum(1) / variance.square().clamp(min=1e-12)))
    center, variance, kurtosis = (torch.stack(pair, dim=1) for pair in zip(*rows))
    return center, variance, kurtosis
