"""Augmentation of whole clips on the device: every frame of a clip gets the same crop and flip."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiScaleCrop(nn.Module):
    """Random crop of one of several sizes, resized back: the only augmentation VideoMAE pre-trains with.

    Height and width of the crop are scales of the short side that stand at most one step apart; the crop's place is
    random.

    Args:
        size: height and width of the result in pixels.
        scales: crop sizes as shares of the short side, in (0, 1], largest first.
        flip: probability of a left-right flip. Keep 0 where left and right are labels.

    Raises:
        ValueError: for scales outside (0, 1] or a flip outside [0, 1].
    """

    def __init__(self, size: int, scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66), flip: float = 0.0):
        super().__init__()
        if not scales or not all(0 < scale <= 1 for scale in scales):
            raise ValueError(f"augment.scales={scales} must be shares of the picture in (0, 1], at least one.")
        if not 0 <= flip <= 1:
            raise ValueError(f"augment.flip={flip} is not a probability: use a number in [0, 1].")
        self.size, self.scales, self.flip = size, tuple(scales), flip

    def forward(self, video: Tensor) -> Tensor:
        """float (B, C, T, H, W) -> (B, C, T, size, size)."""
        return torch.stack([self._one(clip) for clip in video])

    def _one(self, clip: Tensor) -> Tensor:
        height, width = clip.shape[-2:]
        short = min(height, width)
        row = int(torch.randint(len(self.scales), ()))
        nearby = [other for other in (row - 1, row, row + 1) if 0 <= other < len(self.scales)]
        column = nearby[int(torch.randint(len(nearby), ()))]
        crop_height, crop_width = int(short * self.scales[row]), int(short * self.scales[column])
        top = int(torch.randint(height - crop_height + 1, ()))
        left = int(torch.randint(width - crop_width + 1, ()))
        crop = clip[..., top : top + crop_height, left : left + crop_width].transpose(0, 1)  # (T, C, h, w)
        crop = F.interpolate(crop, size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        if torch.rand(()) < self.flip:
            crop = crop.flip(-1)
        return crop.transpose(0, 1)
