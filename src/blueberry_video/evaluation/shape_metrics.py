"""What a generated clip of moving shapes shows, told by rules: does it do what its caption says?

The colour is the channel with the most light. In every frame, each shape is laid at every place, as far as the border
lets one see it, over the pixels that are lit; the shape with the largest intersection over union is it, and where it
fits best is its centre. The direction is the slope of the centre over the frames.

No rule is trained, and chance is known: 1/3, 1/3 and 1/4. Of clips without any shape or motion, shape and direction are
counted as wrong, not as one of the classes, so that such clips score less than chance.
"""

from functools import lru_cache

import torch
from torch import Tensor

SHAPES = ("square", "disc", "triangle")
COLOURS = ("red", "green", "blue")
DIRECTIONS = ("left", "right", "up", "down")
NONE = -1  # neither of the classes

_LEAST_IOU = 0.5  # mean over frames, below which there is no shape: noise gets 0.2
_LEAST_SLOPE = 0.5  # pixels a frame, below which nothing moves: a true clip has 1


def classify(video: Tensor) -> dict[str, Tensor]:
    """Labels of clips.

    Args:
        video: (N, 3, T, H, W) in [-1, 1], background -1; T at least 2. Shapes are 7 pixels wide.

    Returns:
        ``shape``, ``colour`` and ``direction``: long (N,) each, the index in :data:`SHAPES`, :data:`COLOURS` and
        :data:`DIRECTIONS`, or -1 for none.

    Raises:
        ValueError: for a video of another shape.
    """
    if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] < 2:
        raise ValueError(f"clips of shape {tuple(video.shape)}: give (N, 3, T, H, W) with 2 frames or more.")
    height, width = video.shape[3:]
    colour = video.float().sum(dim=(2, 3, 4)).argmax(dim=1)
    lit = (video[torch.arange(len(video)), colour] > 0).flatten(2).float()  # (N, T, H W)
    templates = _templates(height, width).to(video.device)  # (shapes, places, H W)
    common = torch.einsum("ntk,spk->ntsp", lit, templates)
    union = lit.sum(-1)[:, :, None, None] + templates.sum(-1) - common
    fit, place = (common / union).max(dim=3)  # (N, T, shapes)
    score, shape = fit.mean(dim=1).max(dim=1)
    best = place.gather(2, shape[:, None, None].expand(-1, place.shape[1], 1)).squeeze(2)  # (N, T)
    path = torch.stack([best // width, best % width], dim=2)  # (N, T, 2)
    direction = _direction(path, (height, width))
    found = score >= _LEAST_IOU
    return {
        "shape": shape.where(found, NONE),
        "colour": colour,
        "direction": direction.where(found, NONE),
    }


def caption_labels(captions: list[str]) -> dict[str, Tensor]:
    """Labels (N,) long that captions such as "a red square moves left" ask for.

    Raises:
        ValueError: for a caption that does not name exactly one class of each label.
    """
    labels: dict[str, list[int]] = {"shape": [], "colour": [], "direction": []}
    for caption in captions:
        words = caption.split()
        for label, names in zip(labels, (SHAPES, COLOURS, DIRECTIONS)):
            said = [index for index, name in enumerate(names) if name in words]
            if len(said) != 1:
                raise ValueError(f"the caption {caption!r} does not name one {label}, of {', '.join(names)}.")
            labels[label] += said
    return {label: torch.tensor(values) for label, values in labels.items()}


def accuracies(video: Tensor, labels: dict[str, Tensor]) -> dict[str, float]:
    """Share in [0, 1] of clips (N, 3, T, H, W), see :func:`classify`, that show what ``labels`` (N,) say, by label."""
    told = classify(video)
    return {label: (told[label] == labels[label].to(told[label].device)).float().mean().item() for label in told}


def _direction(path: Tensor, size: tuple[int, int]) -> Tensor:
    """Index (N,) of the direction of centres (N, T, 2), rows and columns that go round at ``size``, or -1."""
    around = path.new_tensor(size)
    step = (path.diff(dim=1) + around // 2) % around - around // 2  # the short way round
    unrolled = torch.cat([path[:, :1], path[:, :1] + step.cumsum(dim=1)], dim=1).float()
    time = torch.arange(path.shape[1], device=path.device).float()
    time = time - time.mean()
    slope = torch.einsum("ntk,t->nk", unrolled, time) / time.square().sum()  # least squares
    towards = torch.stack([-slope[:, 1], slope[:, 1], -slope[:, 0], slope[:, 0]], dim=1)  # as DIRECTIONS
    speed, direction = towards.max(dim=1)
    return direction.where(speed >= _LEAST_SLOPE, NONE)


@lru_cache(maxsize=4)
def _templates(height: int, width: int) -> Tensor:
    """Every shape with its centre at every pixel: float (shapes, H W, H W), 1 where it is."""
    rows, columns = torch.arange(height), torch.arange(width)
    places = torch.cartesian_prod(rows, columns)
    dy = places[None, :, 0] - places[:, None, 0]  # (centres, pixels)
    dx = places[None, :, 1] - places[:, None, 1]
    square = (dy.abs() <= 3) & (dx.abs() <= 3)
    disc = dy.square() + dx.square() <= 10
    triangle = (dy.abs() <= 3) & (2 * dx.abs() <= dy + 3)
    return torch.stack([square, disc, triangle]).float()
