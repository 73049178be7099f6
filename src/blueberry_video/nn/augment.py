"""Augmentation of whole clips on the device: every frame of a clip gets the same crop and flip."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Where a crop may lie, in quarters (down, across) of the room it has: corners, sides, centre, and between them.
OFFSETS = ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (4, 2), (0, 2), (1, 1), (1, 3), (3, 1), (3, 3))


class MultiScaleCrop(nn.Module):
    """Random crop of one of several sizes, resized back: the only augmentation VideoMAE pre-trains with.

    Height and width are scales of the short side at most one step apart, all such pairs alike likely; the crop lies at
    one of 13 fixed places (Temporal Segment Networks, arXiv 1608.00859).

    Args:
        size: height and width of the result in pixels.
        scales: crop sizes as shares of the short side, in (0, 1], largest first. A size within two pixels of ``size``
            becomes ``size``, which saves the resize.
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
        steps = range(len(scales))
        self._pairs = [(i, j) for i in steps for j in steps if abs(i - j) <= 1]

    def forward(self, video: Tensor) -> Tensor:
        """float (B, C, T, H, W) -> (B, C, T, size, size)."""
        return torch.stack([self._one(clip) for clip in video])

    def _one(self, clip: Tensor) -> Tensor:
        height, width = clip.shape[-2:]
        lengths = [int(min(height, width) * scale) for scale in self.scales]
        lengths = [self.size if abs(length - self.size) < 3 else length for length in lengths]
        i, j = self._pairs[int(torch.randint(len(self._pairs), ()))]
        crop_height, crop_width = min(lengths[i], height), min(lengths[j], width)
        down, across = OFFSETS[int(torch.randint(len(OFFSETS), ()))]
        top, left = down * ((height - crop_height) // 4), across * ((width - crop_width) // 4)
        crop = clip[..., top : top + crop_height, left : left + crop_width].transpose(0, 1)  # (T, C, h, w)
        if (crop_height, crop_width) != (self.size, self.size):
            crop = F.interpolate(
                crop, size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False
            )
        if torch.rand(()) < self.flip:
            crop = crop.flip(-1)
        return crop.transpose(0, 1)
