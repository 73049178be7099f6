"""Augmentation of whole clips on the device: every frame of a clip gets the same crop, flip and hole.

Each module takes and gives video float (B, C, T, H, W) in [0, 1] and draws anew for every clip, from torch's global
generator; several in a row are a ``torch.nn.Sequential``.
"""

import math
from typing import Literal

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
        _check_probability("flip", flip)
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


class RandomResizedCrop(nn.Module):
    """Random crop of any size and shape, resized to a square: what classifiers are fine-tuned with (Szegedy et al.,
    arXiv 1409.4842; VideoMAE's fine-tuning has these defaults).

    Args:
        size: height and width of the result in pixels.
        scale: least and greatest share of the picture's area.
        ratio: least and greatest width over height; drawn evenly on a logarithmic scale.

    Raises:
        ValueError: for shares outside (0, 1], ratios that are not positive, or a range that ends before it begins.
    """

    def __init__(
        self, size: int, scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
    ):
        super().__init__()
        _check_range("scale", scale, most=1.0)
        _check_range("ratio", ratio)
        self.size, self.scale, self.ratio = size, scale, ratio

    def forward(self, video: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T, size, size)."""
        height, width = video.shape[-2:]
        boxes, fits = random_boxes(len(video), height, width, self.scale, self.ratio)
        boxes = torch.where(fits[:, None], boxes, torch.tensor(self._centred(height, width)))
        return torch.stack([self._resized(clip, *box) for clip, box in zip(video, boxes.tolist(), strict=True)])

    def _centred(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The largest box of an allowed ratio, in the middle."""
        box_height = min(height, round(width / self.ratio[0]))
        box_width = min(width, round(height * self.ratio[1]))
        return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width

    def _resized(self, clip: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
        crop = clip[..., top : top + height, left : left + width].transpose(0, 1)  # (T, C, h, w)
        size = (self.size, self.size)
        crop = F.interpolate(crop, size=size, mode="bilinear", antialias=True, align_corners=False)
        return crop.transpose(0, 1)


class HorizontalFlip(nn.Module):
    """Mirrors a clip left to right. Not where left and right are labels, as in Something-Something.

    Args:
        probability: for each clip.

    Raises:
        ValueError: for a probability outside [0, 1].
    """

    def __init__(self, probability: float = 0.5):
        super().__init__()
        _check_probability("probability", probability)
        self.probability = probability

    def forward(self, video: Tensor) -> Tensor:
        """(B, C, T, H, W) -> the same shape."""
        chosen = torch.rand(len(video)) < self.probability
        return torch.stack([clip.flip(-1) if flip else clip for clip, flip in zip(video, chosen.tolist(), strict=True)])


class RandomErasing(nn.Module):
    """Overwrites a box with noise, the same box in all frames of a clip (Zhong et al., arXiv 1708.04896; the defaults
    are those of VideoMAE's fine-tuning).

    Published models erase after normalising, with standard normal noise or zeros. Here pixels are still in [0, 1], so
    noise has the mean and deviation that normalising takes out, and a constant is that mean.

    Args:
        probability: for each clip.
        area: least and greatest share of the picture.
        ratio: least and greatest width over height; drawn evenly on a logarithmic scale.
        mode: ``"noise"``: each value of each pixel and frame on its own; ``"constant"``: the mean colour.
        mean, std: of the pixels, by channel; those that the task normalises with.

    Raises:
        ValueError: for a probability or shares outside [0, 1], ratios that are not positive, a range that ends before
            it begins, or an unknown mode.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        probability: float = 0.25,
        area: tuple[float, float] = (0.02, 1 / 3),
        ratio: tuple[float, float] = (0.3, 1 / 0.3),
        mode: Literal["noise", "constant"] = "noise",
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
    ):
        super().__init__()
        _check_probability("probability", probability)
        _check_range("area", area, most=1.0)
        _check_range("ratio", ratio)
        if mode not in ("noise", "constant"):
            raise ValueError(f"augment.mode={mode!r} is unknown: choose 'noise' or 'constant'.")
        self.probability, self.area, self.ratio, self.mode = probability, area, ratio, mode
        self.register_buffer("mean", torch.tensor(list(mean)).view(-1, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(-1, 1, 1, 1), persistent=False)

    def forward(self, video: Tensor) -> Tensor:
        """(B, C, T, H, W) -> the same shape; noise may leave [0, 1]."""
        chosen = torch.rand(len(video)) < self.probability
        boxes, fits = random_boxes(len(video), video.shape[-2], video.shape[-1], self.area, self.ratio)
        video = video.clone()
        for index in (chosen & fits).nonzero().flatten().tolist():
            top, left, height, width = boxes[index].tolist()
            hole = video[index, :, :, top : top + height, left : left + width]  # (C, T, h, w)
            if self.mode == "constant":
                hole.copy_(self.mean.expand_as(hole))
            else:
                hole.normal_().mul_(self.std).add_(self.mean)
        return video


def random_boxes(
    count: int, height: int, width: int, area: tuple[float, float], ratio: tuple[float, float], attempts: int = 10
) -> tuple[Tensor, Tensor]:
    """Boxes of random area, shape and place in a picture, drawn on the CPU.

    Args:
        count: number of boxes.
        height, width: of the picture in pixels.
        area: range of a box's share of the picture, drawn evenly.
        ratio: range of its width over its height, drawn evenly on a logarithmic scale.
        attempts: draws a box, of which the first that fits into the picture is taken.

    Returns:
        (top, left, height, width) of each, long (count, 4), and which of them fit, bool (count,).
    """
    logs = [math.log(limit) for limit in ratio]
    pixels = torch.empty(count, attempts).uniform_(*area) * height * width
    shape = torch.empty(count, attempts).uniform_(*logs).exp()
    heights, widths = (pixels / shape).sqrt().round(), (pixels * shape).sqrt().round()
    fits = (heights >= 1) & (widths >= 1) & (heights <= height) & (widths <= width)
    first = fits.byte().argmax(dim=1, keepdim=True)
    sides = torch.cat([heights.gather(1, first), widths.gather(1, first)], dim=1)
    places = (torch.rand(count, 2) * (torch.tensor([height, width]) - sides + 1)).floor()
    return torch.cat([places, sides], dim=1).long(), fits.any(dim=1)


def _check_probability(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"augment.{key}={value} is not a probability: use a number in [0, 1].")


def _check_range(key: str, limits: tuple[float, float], most: float = math.inf) -> None:
    least, greatest = limits
    if not 0 < least <= greatest <= most:
        above = f", at most {most:g}" if most < math.inf else ""
        raise ValueError(
            f"augment.{key}={tuple(limits)} is not a range: give its least and greatest value, above 0{above}."
        )


class Mixing(nn.Module):
    """Mixes each clip with the one at the mirrored place in the batch, all by the same share.

    MixUp (Zhang et al., arXiv 1710.09412) adds them up; CutMix (Yun et al., arXiv 1905.04899) puts a box of the other
    clip, the same in all frames, into this one. One of the two is drawn for each batch, with its share from a Beta
    distribution. The defaults are those of VideoMAE's fine-tuning.

    Args:
        mixup_alpha, cutmix_alpha: both parameters of the Beta distribution; 0 switches that one off.
        switch_prob: probability of CutMix where both are on.
        prob: probability that a batch is mixed at all.

    Raises:
        ValueError: for a negative alpha, both at 0, or probabilities outside [0, 1].
    """

    def __init__(
        self, mixup_alpha: float = 0.8, cutmix_alpha: float = 1.0, switch_prob: float = 0.5, prob: float = 1.0
    ):
        super().__init__()
        if min(mixup_alpha, cutmix_alpha) < 0 or max(mixup_alpha, cutmix_alpha) == 0:
            raise ValueError(
                f"mixing.mixup_alpha={mixup_alpha}, mixing.cutmix_alpha={cutmix_alpha}: none may be negative, and one "
                "must be above 0; to mix nothing, set task.mixing=null."
            )
        for key, value in (("switch_prob", switch_prob), ("prob", prob)):
            if not 0 <= value <= 1:
                raise ValueError(f"mixing.{key}={value} is not a probability: use a number in [0, 1].")
        self.mixup_alpha, self.cutmix_alpha, self.switch_prob, self.prob = mixup_alpha, cutmix_alpha, switch_prob, prob

    def forward(self, video: Tensor) -> tuple[Tensor, float]:
        """Video (B, C, T, H, W) -> the mixed video, and the share in [0, 1] of each clip that is its own; for
        CutMix that of the pixels that were in fact left. A share of 1 leaves the video as it was."""
        if torch.rand(()) >= self.prob:
            return video, 1.0
        cut = self.mixup_alpha == 0 or (self.cutmix_alpha > 0 and bool(torch.rand(()) < self.switch_prob))
        alpha = self.cutmix_alpha if cut else self.mixup_alpha
        own = torch.distributions.Beta(alpha, alpha).sample().item()
        return _cutmix(video, own) if cut else (torch.lerp(video.flip(0), video, own), own)


def _cutmix(video: Tensor, own: float) -> tuple[Tensor, float]:
    """A box of about ``1 - own`` of the area, cut off where it leaves the picture."""
    height, width = video.shape[-2:]
    half_height, half_width = (int(side * (1 - own) ** 0.5) // 2 for side in (height, width))
    y, x = (int(torch.randint(side, ())) for side in (height, width))
    rows = slice(max(y - half_height, 0), min(y + half_height, height))
    columns = slice(max(x - half_width, 0), min(x + half_width, width))
    mixed = video.clone()
    mixed[..., rows, columns] = video[..., rows, columns].flip(0)
    return mixed, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)


def soft_targets(labels: Tensor, num_classes: int, own: float = 1.0, smoothing: float = 0.0) -> Tensor:
    """Labels long (B,) -> probabilities (B, num_classes) of a batch that :class:`Mixing` has mixed.

    Args:
        labels: of the clips before mixing.
        num_classes: number of classes.
        own: share of each clip that is its own.
        smoothing: spread over all classes, the right one included (Szegedy et al., arXiv 1512.00567).
    """
    one_hot = torch.nn.functional.one_hot(labels, num_classes).float()
    smooth = one_hot * (1 - smoothing) + smoothing / num_classes
    return own * smooth + (1 - own) * smooth.flip(0)
