"""Videos of depth in colors."""

import torch
from torch import Tensor

# far to near: dark violet, violet, red, orange, pale yellow; values of the color map inferno at equal distances
COLORS = (
    (0.001, 0.000, 0.014),
    (0.180, 0.044, 0.391),
    (0.397, 0.083, 0.433),
    (0.609, 0.155, 0.393),
    (0.804, 0.269, 0.278),
    (0.943, 0.447, 0.120),
    (0.987, 0.673, 0.080),
    (0.947, 0.897, 0.391),
    (0.988, 0.998, 0.645),
)


def colored(maps: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Colors maps with one fixed range per clip, so that the same value has the same color in all frames.

    Args:
        maps: (B, T, H, W), larger for nearer pixels; NaN becomes gray.
        low, high: (B,), the values of the darkest and the brightest color.

    Returns:
        (B, 3, T, H, W) in [0, 1].
    """
    span = (high - low).clamp(min=torch.finfo(maps.dtype).eps)[:, None, None, None]
    position = ((maps - low[:, None, None, None]) / span).clamp(0, 1).nan_to_num(0.0) * (len(COLORS) - 1)
    table = torch.tensor(COLORS, dtype=maps.dtype, device=maps.device)
    first = position.floor().clamp(max=len(COLORS) - 2)
    index, share = first.long(), (position - first)[..., None]
    colors = torch.lerp(table[index], table[index + 1], share)
    return torch.where(maps.isnan()[..., None], 0.5, colors).permute(0, 4, 1, 2, 3)


def range_of(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the smallest and the largest value (B,) of each clip (B, T, H, W), ignoring NaN; 0 and 1 without any."""
    flat = maps.flatten(1)
    low, high = flat.nan_to_num(torch.inf).amin(1), flat.nan_to_num(-torch.inf).amax(1)
    known = low <= high
    return torch.where(known, low, 0.0), torch.where(known, high, 1.0)
