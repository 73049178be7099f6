"""Rule-based classification of clips of moving shapes, to check whether they match their captions.

The color is the channel with the largest sum. Per frame, every shape at every pixel is compared with the lit pixels;
the shape with the largest intersection over union is predicted, and its best position is the center. The direction is
the slope of the center over the frames.

No rule is trained, and the chance levels are 1/3, 1/3 and 1/4. Clips without a shape or without motion get -1, not one
of the classes, so they score below chance level.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

SHAPES = ("square", "disc", "triangle")
COLOURS = ("red", "green", "blue")
DIRECTIONS = ("left", "right", "up", "down")
NONE = -1  # no class

_LEAST_IOU = 0.5  # mean over frames; below it there is no shape (noise reaches 0.2)
_LEAST_SLOPE = 0.5  # pixels per frame; below it there is no motion (real clips have 1)


def classify(video: Tensor) -> dict[str, Tensor]:
    """Classifies the shape, color and direction of clips.

    Args:
        video: (N, 3, T, H, W) in [-1, 1], background -1; T at least 2. Shapes are 7 pixels wide.

    Returns:
        ``shape``, ``colour`` and ``direction``: long (N,) each, the index in :data:`SHAPES`, :data:`COLOURS` and
        :data:`DIRECTIONS`, or -1.

    Raises:
        ValueError: for a tensor of a different shape.
    """
    if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] < 2:
        raise ValueError(f"video of shape {tuple(video.shape)} must be (N, 3, T, H, W) with T of at least 2.")
    height, width = video.shape[3:]
    colour = video.float().sum(dim=(2, 3, 4)).argmax(dim=1)
    lit = (video[torch.arange(len(video)), colour] > 0).flatten(2).float()  # (N, T, H W)
    templates = _templates(height, width).to(video.device)  # (shapes, centers, H W)
    common = torch.einsum("ntk,spk->ntsp", lit, templates)
    union = lit.sum(-1)[:, :, None, None] + templates.sum(-1) - common
    fit, position = (common / union).max(dim=3)  # (N, T, shapes)
    score, shape = fit.mean(dim=1).max(dim=1)
    best = position.gather(2, shape[:, None, None].expand(-1, position.shape[1], 1)).squeeze(2)  # (N, T)
    path = torch.stack([best // width, best % width], dim=2)  # (N, T, 2)
    direction = _direction(path, (height, width))
    found = score >= _LEAST_IOU
    return {"shape": shape.where(found, NONE), "colour": colour, "direction": direction.where(found, NONE)}


def caption_labels(captions: list[str]) -> dict[str, Tensor]:
    """Returns the labels, long (N,) each, named by captions such as "a red square moves left".

    Raises:
        ValueError: for a caption that does not name exactly one class of each label.
    """
    labels: dict[str, list[int]] = {"shape": [], "colour": [], "direction": []}
    for caption in captions:
        words = caption.split()
        for label, names in zip(labels, (SHAPES, COLOURS, DIRECTIONS)):
            found = [index for index, name in enumerate(names) if name in words]
            if len(found) != 1:
                raise ValueError(f"caption={caption!r} must name exactly one {label} of {', '.join(names)}.")
            labels[label] += found
    return {label: torch.tensor(values) for label, values in labels.items()}


def accuracies(video: Tensor, labels: dict[str, Tensor]) -> dict[str, float]:
    """Returns label -> share in [0, 1] of clips (N, 3, T, H, W) that :func:`classify` assigns to ``labels`` (N,)."""
    found = classify(video)
    return {label: (found[label] == labels[label].to(found[label].device)).float().mean().item() for label in found}


def nearest_psnr(video: Tensor, captions: Sequence[str], real: Tensor, real_captions: Sequence[str]) -> Tensor:
    """Returns the PSNR (N,) in dB of clips (N, 3, T, H, W) in [-1, 1] to the most similar real clip of equal caption.

    Raises:
        ValueError: for a caption without real clips.
    """
    values = []
    for clip, caption in zip(video, captions, strict=True):
        same = [index for index, other in enumerate(real_captions) if other == caption]
        if not same:
            raise ValueError(f"captions has {caption!r}, of which there is no real clip: use all classes.")
        error = (real[same].to(clip) - clip).square().flatten(1).mean(1).min()
        values.append(10 * torch.log10(4 / error.clamp(min=1e-10)))
    return torch.stack(values)


def _direction(path: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns the direction index (N,), or -1, of centers (N, T, 2): rows and columns that wrap at ``size``."""
    period = path.new_tensor(size)
    step = (path.diff(dim=1) + period // 2) % period - period // 2  # shortest displacement with wrap-around
    unrolled = torch.cat([path[:, :1], path[:, :1] + step.cumsum(dim=1)], dim=1).float()
    time = torch.arange(path.shape[1], device=path.device).float()
    time = time - time.mean()
    slope = torch.einsum("ntk,t->nk", unrolled, time) / time.square().sum()  # least squares
    towards = torch.stack([-slope[:, 1], slope[:, 1], -slope[:, 0], slope[:, 0]], dim=1)  # order of DIRECTIONS
    speed, direction = towards.max(dim=1)
    return direction.where(speed >= _LEAST_SLOPE, NONE)


@lru_cache(maxsize=4)
def _templates(height: int, width: int) -> Tensor:
    """Binary masks of every shape centered at every pixel: float (shapes, centers H W, pixels H W)."""
    rows, columns = torch.arange(height), torch.arange(width)
    positions = torch.cartesian_prod(rows, columns)
    dy = positions[None, :, 0] - positions[:, None, 0]  # (centers, pixels)
    dx = positions[None, :, 1] - positions[:, None, 1]
    square = (dy.abs() <= 3) & (dx.abs() <= 3)
    disc = dy.square() + dx.square() <= 10
    triangle = (dy.abs() <= 3) & (2 * dx.abs() <= dy + 3)
    return torch.stack([square, disc, triangle]).float()
