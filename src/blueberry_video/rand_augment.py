"""RandAugment (Cubuk et al., arXiv 1909.13719) of the published fine-tuning of VideoMAE, VideoMAE V2 and V-JEPA 2:
``rand-m7-n4-mstd0.5-inc1`` in the notation of timm, with every operation applied alike to all frames of a clip.

Operations map uint8 (T, 3, H, W) and a strength to the same. Their pixels are those of Pillow, which the published
recipes use: results are truncated to whole levels after each operation, tables of values are those of each frame, and
geometric operations interpolate with Pillow's cubic (a = -1) and fill with gray.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

FILL = 128  # gray level outside the frame
MAX_MAGNITUDE = 10.0


class Operation(NamedTuple):
    """An operation of :data:`OPERATIONS` and its strength, in the unit of :data:`STRENGTHS`."""

    name: str
    strength: float


class RandAugment(nn.Module):
    """Random operations on color and geometry, the same in all frames of a clip; maps video float (B, 3, T, H, W) in
    [0, 1] to the same, in steps of 1/255.

    ``num_ops`` times, one of 15 operations is drawn uniformly, with replacement, and applied with ``probability``. Its
    magnitude is drawn from a normal distribution and clipped to [0, 10]; a higher one always changes more. The defaults
    are those of the fine-tuning of VideoMAE, in which this is the first augmentation, before crop, flip and erasing.

    Geometric operations keep neither left and right nor absolute positions, and inversion and posterization no colors:
    leave them out where these are labels.

    Args:
        magnitude: mean magnitude, in [0, 10]. At 10, rotations are 30 degrees, shears 0.3, translations 0.45 of the
            frame, and factors of color, contrast, brightness and sharpness 0.1 or 1.9.
        num_ops: number of operations.
        magnitude_std: standard deviation of the magnitude.
        probability: probability of each drawn operation.

    Raises:
        ValueError: ``magnitude`` is outside [0, 10], ``num_ops`` below 1, ``magnitude_std`` negative or ``probability``
            outside [0, 1]; in ``forward``, the video has no three channels.
    """

    def __init__(self, magnitude: float = 7.0, num_ops: int = 4, magnitude_std: float = 0.5, probability: float = 0.5):
        super().__init__()
        if not 0 <= magnitude <= MAX_MAGNITUDE or magnitude_std < 0 or num_ops < 1:
            raise ValueError(
                f"augment.magnitude={magnitude} must be in [0, 10], augment.magnitude_std={magnitude_std} at least 0 "
                f"and augment.num_ops={num_ops} at least 1: VideoMAE uses 7, 0.5 and 4."
            )
        if not 0 <= probability <= 1:
            raise ValueError(f"augment.probability={probability} must be a probability, in [0, 1].")
        self.magnitude, self.num_ops = magnitude, num_ops
        self.magnitude_std, self.probability = magnitude_std, probability

    def forward(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> the same shape."""
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"RandAugment requires RGB videos (B, 3, T, H, W), not the shape {tuple(video.shape)}.")
        frames = (video.float() * 255).round().clamp(0, 255).to(torch.uint8).transpose(1, 2)
        changed = torch.stack([apply_operations(clip, self.draw()) for clip in frames])
        return (changed.transpose(1, 2).float() / 255).to(video.dtype)

    def draw(self) -> list[Operation]:
        """Operations of one clip, from the global generator."""
        drawn, names = [], tuple(OPERATIONS)
        for _ in range(self.num_ops):
            name = names[int(torch.randint(len(names), ()))]
            chosen, negative = (torch.rand(2) < torch.tensor([self.probability, 0.5])).tolist()
            magnitude = self.magnitude + self.magnitude_std * torch.randn(()).item()
            if chosen:
                share = min(max(magnitude, 0.0), MAX_MAGNITUDE) / MAX_MAGNITUDE
                drawn.append(Operation(name, STRENGTHS[name](share, -1.0 if negative else 1.0)))
        return drawn


def apply_operations(frames: Tensor, operations: list[Operation]) -> Tensor:
    """Applies operations in order to uint8 (T, 3, H, W), each alike to all frames."""
    for operation in operations:
        frames = OPERATIONS[operation.name](frames, operation.strength)
    return frames


# ---- color -----------------------------------------------------------------------------------------------------------


def auto_contrast(frames: Tensor, _: float) -> Tensor:
    """Stretches each channel of each frame to [0, 255]; channels of one value are unchanged."""
    pixels = frames.flatten(2).double()
    low, high = pixels.amin(dim=2, keepdim=True), pixels.amax(dim=2, keepdim=True)
    scale = torch.full_like(low, 255.0) / (high - low).clamp(min=1)  # 255 / tensor would round a reciprocal first
    levels = torch.arange(256, device=frames.device, dtype=torch.float64)
    table = (levels * scale + -low * scale).clamp(0, 255).to(torch.uint8)  # truncated
    return _by_tables(frames, torch.where(high > low, table, levels.to(torch.uint8)))


def equalize(frames: Tensor, _: float) -> Tensor:
    """Flattens the histogram of each channel of each frame."""
    pixels = frames.flatten(2).long()
    counts = torch.zeros(*pixels.shape[:2], 256, dtype=torch.long, device=frames.device)
    counts.scatter_add_(2, pixels, torch.ones_like(pixels))
    last = counts.gather(2, pixels.amax(dim=2, keepdim=True))  # of the brightest level
    step = (pixels.shape[2] - last) // 255
    below = counts.cumsum(dim=2) - counts
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return _by_tables(frames, torch.where(step > 0, table, torch.arange(256, device=frames.device)).to(torch.uint8))


def invert(frames: Tensor, _: float) -> Tensor:
    """255 minus each value."""
    return 255 - frames


def posterize(frames: Tensor, bits: float) -> Tensor:
    """Keeps the highest ``bits`` (0 to 8) of each value."""
    return frames & (256 - 2 ** (8 - int(bits)))


def solarize(frames: Tensor, threshold: float) -> Tensor:
    """Inverts values from ``threshold`` on."""
    return torch.where(frames.short() < int(threshold), frames, 255 - frames)


def solarize_add(frames: Tensor, amount: float) -> Tensor:
    """Adds ``amount`` to values below 128."""
    added = (frames.short() + int(amount)).clamp(max=255).to(torch.uint8)
    return torch.where(frames < 128, added, frames)


def color(frames: Tensor, factor: float) -> Tensor:
    """Extrapolates from the gray picture: 0 is gray, 1 unchanged."""
    return _blend(_gray(frames).expand_as(frames), frames, factor)


def contrast(frames: Tensor, factor: float) -> Tensor:
    """Extrapolates from the mean gray level of each frame, rounded."""
    gray = _gray(frames).long()
    pixels = gray[0].numel()
    mean = (2 * gray.sum(dim=(1, 2, 3), keepdim=True) + pixels) // (2 * pixels)
    return _blend(mean.expand_as(frames), frames, factor)


def brightness(frames: Tensor, factor: float) -> Tensor:
    """Extrapolates from black."""
    return _blend(torch.zeros_like(frames), frames, factor)


def sharpness(frames: Tensor, factor: float) -> Tensor:
    """Extrapolates from a smoothed picture: a mean over 3 x 3 pixels, the center five times, without the border."""
    smooth = frames.int()
    if min(frames.shape[2:]) > 2:
        rows = smooth[:, :, :-2] + smooth[:, :, 1:-1] + smooth[:, :, 2:]
        total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * smooth[:, :, 1:-1, 1:-1]
        smooth = smooth.clone()
        smooth[:, :, 1:-1, 1:-1] = (2 * total + 13) // 26  # rounded; 13 has no ties
    return _blend(smooth, frames, factor)


def _by_tables(frames: Tensor, tables: Tensor) -> Tensor:
    """Replaces each value by that of its table (T, 3, 256)."""
    return tables.gather(2, frames.flatten(2).long()).view_as(frames)


def _gray(frames: Tensor) -> Tensor:
    """Luma (T, 1, H, W) of BT.601 in 16-bit fixed point, rounded."""
    red, green, blue = frames.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _blend(start: Tensor, frames: Tensor, factor: float) -> Tensor:
    """start + factor * (frames - start) in float32, clipped and truncated."""
    start = start.float()
    return (start + factor * (frames.float() - start)).clamp(0, 255).to(torch.uint8)


# ---- geometry --------------------------------------------------------------------------------------------------------


def rotate(frames: Tensor, degrees: float) -> Tensor:
    """Rotates counterclockwise about the center."""
    height, width = frames.shape[2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return _affine(frames, (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y))


def shear_x(frames: Tensor, factor: float) -> Tensor:
    """Shifts row y by ``factor`` * y pixels to the left."""
    return _affine(frames, (1.0, factor, 0.0), (0.0, 1.0, 0.0))


def shear_y(frames: Tensor, factor: float) -> Tensor:
    """Shifts column x by ``factor`` * x pixels upwards."""
    return _affine(frames, (1.0, 0.0, 0.0), (factor, 1.0, 0.0))


def translate_x(frames: Tensor, share: float) -> Tensor:
    """Shifts by a share of the width to the left."""
    return _affine(frames, (1.0, 0.0, share * frames.shape[3]), (0.0, 1.0, 0.0))


def translate_y(frames: Tensor, share: float) -> Tensor:
    """Shifts by a share of the height upwards."""
    return _affine(frames, (1.0, 0.0, 0.0), (0.0, 1.0, share * frames.shape[2]))


def _affine(frames: Tensor, to_x: tuple[float, float, float], to_y: tuple[float, float, float]) -> Tensor:
    """Reads each pixel at (a x + b y + c) of its center (x, y), with cubic interpolation; outside is gray."""
    height, width = frames.shape[2:]
    y, x = torch.meshgrid(*(torch.arange(side).double() + 0.5 for side in (height, width)), indexing="ij")
    at_x, at_y = (a * x + b * y + c for a, b, c in (to_x, to_y))
    inside = ((at_x >= 0) & (at_x < width) & (at_y >= 0) & (at_y < height)).to(frames.device)
    columns, across = _taps(at_x, width)
    rows, down = _taps(at_y, height)
    pixels = frames.flatten(2)
    lines = []
    for row in rows:
        taps = [pixels.index_select(2, (row * width + column).flatten().to(frames.device)) for column in columns]
        lines.append(_cubic(taps, across.flatten().to(frames.device)))
    values = _cubic(lines, down.flatten().to(frames.device)).clamp(0, 255).to(torch.uint8).view_as(frames)
    return torch.where(inside, values, FILL)


def _taps(position: Tensor, length: int) -> tuple[list[Tensor], Tensor]:
    """Indices of the four pixels around each position, or of one if all are at pixel centers, and the distance from the
    second; the border is repeated."""
    first = (position - 0.5).floor()
    distance = position - 0.5 - first
    offsets = (-1, 0, 1, 2) if distance.any() else (0,)
    return [(first.long() + offset).clamp(0, length - 1) for offset in offsets], distance


def _cubic(taps: list[Tensor], distance: Tensor) -> Tensor:
    """Keys' cubic with a = -1 through four values, in float64, at a distance in [0, 1) from the second."""
    if len(taps) == 1:
        return taps[0]
    before, left, right, after = (tap.double() for tap in taps)
    third = before - left + right - after
    return left + distance * (right - before + distance * (before - left + third - distance * third))


OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "auto_contrast": auto_contrast,
    "equalize": equalize,
    "invert": invert,
    "rotate": rotate,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "color": color,
    "contrast": contrast,
    "brightness": brightness,
    "sharpness": sharpness,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
}


def _none(share: float, sign: float) -> float:
    return 0.0


def _factor(share: float, sign: float) -> float:
    return 1.0 + sign * (share * 0.9)


# Strength of an operation at a share of the greatest magnitude, with a sign.
STRENGTHS: dict[str, Callable[[float, float], float]] = {
    "auto_contrast": _none,
    "equalize": _none,
    "invert": _none,
    "rotate": lambda share, sign: sign * (share * 30.0),
    "posterize": lambda share, sign: 4.0 - int(share * 4),
    "solarize": lambda share, sign: 256.0 - int(share * 256),
    "solarize_add": lambda share, sign: float(int(share * 110)),
    "color": _factor,
    "contrast": _factor,
    "brightness": _factor,
    "sharpness": _factor,
    "shear_x": lambda share, sign: sign * (share * 0.3),
    "shear_y": lambda share, sign: sign * (share * 0.3),
    "translate_x": lambda share, sign: sign * (share * 0.45),
    "translate_y": lambda share, sign: sign * (share * 0.45),
}
