"""Augmentation of clips on the device, with the same crop, flip and erased box in all frames of a clip.

Each module maps video float (B, C, T, H, W) in [0, 1] to the same and draws independently for each clip, from the
global generator; ``torch.nn.Sequential`` combines modules.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Offsets of a crop (down, across) in quarters of the largest offset: corners, sides, center, and between them.
OFFSETS = ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (4, 2), (0, 2), (1, 1), (1, 3), (3, 1), (3, 3))


class MultiScaleCrop(nn.Module):
    """Random crop of one of several sizes, resized: the only augmentation in the pre-training of VideoMAE.

    Height and width are a pair of scales of the short side, at most one step apart, drawn uniformly from all such
    pairs; the crop is at one of 13 fixed offsets (Temporal Segment Networks, arXiv 1608.00859).

    Args:
        size: height and width of the output in pixels.
        scales: crop sizes as fractions of the short side, in (0, 1], in descending order. A size within two pixels of
            ``size`` becomes ``size``, which avoids the resize.
        flip: probability of a horizontal flip; use 0 where left and right are labels.
        antialias: resize with antialiasing, as the original, which resizes images of PIL.

    Raises:
        ValueError: ``scales`` are outside (0, 1], or ``flip`` is outside [0, 1].
    """

    def __init__(
        self, size: int, scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66), flip: float = 0.0, antialias: bool = True
    ):
        super().__init__()
        if not scales or not all(0 < scale <= 1 for scale in scales):
            raise ValueError(f"augment.scales={scales} must be one or more fractions of the short side, in (0, 1].")
        _check_probability("augment.flip", flip)
        self.size, self.scales, self.flip, self.antialias = size, tuple(scales), flip, antialias
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
            crop = _resized(crop, self.size, self.antialias)
        if torch.rand(()) < self.flip:
            crop = crop.flip(-1)
        return crop.transpose(0, 1)


class RandomResizedCrop(nn.Module):
    """Random crop of random area and aspect ratio, resized to a square, for fine-tuning of classifiers (Szegedy et al.,
    arXiv 1409.4842; the defaults are those of VideoMAE).

    Args:
        size: height and width of the output in pixels.
        scale: range of the fraction of the image's area.
        ratio: range of width / height, drawn log-uniformly.
        antialias: resize with antialiasing; the published recipes of VideoMAE's fine-tuning and of V-JEPA resize
            without, which leaves more high frequencies in crops larger than ``size``.

    Raises:
        ValueError: ``scale`` is outside (0, 1], ``ratio`` is not positive, or a range is in descending order.
    """

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        antialias: bool = True,
    ):
        super().__init__()
        _check_range("scale", scale, most=1.0)
        _check_range("ratio", ratio)
        self.size, self.scale, self.ratio, self.antialias = size, scale, ratio, antialias

    def forward(self, video: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T, size, size)."""
        height, width = video.shape[-2:]
        boxes, fits = random_boxes(len(video), height, width, self.scale, self.ratio)
        boxes = torch.where(fits[:, None], boxes, torch.tensor(self._center_crop(height, width)))
        return torch.stack([self._resized(clip, *box) for clip, box in zip(video, boxes.tolist(), strict=True)])

    def _center_crop(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Largest centered box with a ratio in the range."""
        box_height = min(height, round(width / self.ratio[0]))
        box_width = min(width, round(height * self.ratio[1]))
        return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width

    def _resized(self, clip: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
        crop = clip[..., top : top + height, left : left + width].transpose(0, 1)  # (T, C, h, w)
        return _resized(crop, self.size, self.antialias).transpose(0, 1)


def _resized(frames: Tensor, size: int, antialias: bool) -> Tensor:
    """Resizes (T, C, H, W) to squares."""
    return F.interpolate(frames, (size, size), mode="bilinear", antialias=antialias, align_corners=False)


class HorizontalFlip(nn.Module):
    """Random horizontal flip. Do not use it where left and right are labels, as in Something-Something.

    Args:
        probability: probability for each clip.

    Raises:
        ValueError: ``probability`` is outside [0, 1].
    """

    def __init__(self, probability: float = 0.5):
        super().__init__()
        _check_probability("augment.probability", probability)
        self.probability = probability

    def forward(self, video: Tensor) -> Tensor:
        """(B, C, T, H, W) -> the same shape."""
        chosen = torch.rand(len(video)) < self.probability
        return torch.stack([clip.flip(-1) if flip else clip for clip, flip in zip(video, chosen.tolist(), strict=True)])


class RandomErasing(nn.Module):
    """Random erasing: overwrites a random box, the same in all frames of a clip (Zhong et al., arXiv 1708.04896; the
    defaults are those of the fine-tuning of VideoMAE).

    Published models erase after normalization, with standard normal noise or zeros. Here pixels are in [0, 1] before
    normalization, so noise has mean ``mean`` and standard deviation ``std``, and a constant is ``mean``.

    Args:
        probability: probability for each clip.
        area: range of the fraction of the image's area.
        ratio: range of width / height, drawn log-uniformly.
        mode: ``"noise"``, independent for each value, or ``"constant"``, the mean color.
        mean, std: mean and standard deviation of the pixels per channel, as in the normalization of the task.

    Raises:
        ValueError: ``probability`` is outside [0, 1], ``area`` is outside (0, 1], ``ratio`` is not positive, a range is
            in descending order, or ``mode`` is unknown.
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
        _check_probability("augment.probability", probability)
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
            box = video[index, :, :, top : top + height, left : left + width]  # (C, T, h, w)
            if self.mode == "constant":
                box.copy_(self.mean.expand_as(box))
            else:
                box.normal_().mul_(self.std).add_(self.mean)
        return video


def random_boxes(
    count: int, height: int, width: int, area: tuple[float, float], ratio: tuple[float, float], attempts: int = 10
) -> tuple[Tensor, Tensor]:
    """Boxes of random area, aspect ratio and position in an image, drawn on the CPU.

    Args:
        count: number of boxes.
        height, width: size of the image in pixels.
        area: range of the fraction of the image's area, drawn uniformly.
        ratio: range of width / height, drawn log-uniformly.
        attempts: draws per box; the first that fits into the image is used.

    Returns:
        Long (count, 4), (top, left, height, width) of each box, and bool (count,), true for boxes that fit.
    """
    logs = [math.log(limit) for limit in ratio]
    pixels = torch.empty(count, attempts).uniform_(*area) * height * width
    shape = torch.empty(count, attempts).uniform_(*logs).exp()
    heights, widths = (pixels / shape).sqrt().round(), (pixels * shape).sqrt().round()
    fits = (heights >= 1) & (widths >= 1) & (heights <= height) & (widths <= width)
    first = fits.byte().argmax(dim=1, keepdim=True)
    sides = torch.cat([heights.gather(1, first), widths.gather(1, first)], dim=1)
    corners = (torch.rand(count, 2) * (torch.tensor([height, width]) - sides + 1)).floor()
    return torch.cat([corners, sides], dim=1).long(), fits.any(dim=1)


def _check_probability(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{key}={value} must be a probability, in [0, 1].")


def _check_range(key: str, limits: tuple[float, float], most: float = math.inf) -> None:
    least, greatest = limits
    if not 0 < least <= greatest <= most:
        above = f", at most {most:g}" if most < math.inf else ""
        raise ValueError(f"augment.{key}={tuple(limits)} must be a range (smallest, largest) of values above 0{above}.")


class ColorJitter(nn.Module):
    """Random brightness, contrast, saturation and hue, in this order, the same in all frames of a clip.

    Args:
        brightness, contrast, saturation: the factor of a clip is drawn from [max(0, 1 - x), 1 + x].
        hue: the colors are rotated by an angle drawn from [-x, x] turns about the gray axis.
        probability: probability for each clip.

    Raises:
        ValueError: a strength is negative, ``hue`` is above 0.5, or ``probability`` is outside [0, 1].
    """

    def __init__(
        self,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.4,
        hue: float = 0.1,
        probability: float = 0.8,
    ):
        super().__init__()
        for key, value in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)):
            if value < 0:
                raise ValueError(f"augment.{key}={value} must be at least 0: 0 for no change.")
        if not 0 <= hue <= 0.5:
            raise ValueError(f"augment.hue={hue} must be in [0, 0.5], a share of a turn.")
        _check_probability("augment.probability", probability)
        self.brightness, self.contrast, self.saturation = brightness, contrast, saturation
        self.hue, self.probability = hue, probability

    def forward(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> the same shape, in [0, 1]."""
        clips = len(video)
        chosen = torch.rand(clips) < self.probability
        strengths = (self.brightness, self.contrast, self.saturation)
        factors = [torch.empty(clips).uniform_(max(0.0, 1 - x), 1 + x) for x in strengths]
        angles = torch.empty(clips).uniform_(-self.hue, self.hue) * 2 * math.pi
        bright, contrast, saturated = (each.to(video).view(-1, 1, 1, 1, 1) for each in factors)
        changed = (video * bright).clamp(0, 1)
        changed = torch.lerp(_gray(changed).mean(dim=(1, 2, 3, 4), keepdim=True), changed, contrast).clamp(0, 1)
        changed = torch.lerp(_gray(changed), changed, saturated).clamp(0, 1)
        if self.hue > 0:
            changed = torch.einsum("bij,bjthw->bithw", _hue_rotations(angles).to(video), changed).clamp(0, 1)
        return torch.where(chosen.to(video.device).view(-1, 1, 1, 1, 1), changed, video)


def _gray(video: Tensor) -> Tensor:
    """Luma (B, 1, T, H, W) of BT.601."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=video.dtype, device=video.device)
    return (video * weights.view(1, 3, 1, 1, 1)).sum(dim=1, keepdim=True)


def _hue_rotations(angles: Tensor) -> Tensor:
    """Matrices (B, 3, 3) that rotate RGB colors by ``angles`` (B,) in radians about the axis of grays."""
    cos, sin = angles.cos().view(-1, 1, 1), angles.sin().view(-1, 1, 1)
    root = 1 / math.sqrt(3)
    cross = torch.tensor([[0, -root, root], [root, 0, -root], [-root, root, 0]])
    return cos * torch.eye(3) + sin * cross + (1 - cos) / 3


class GaussianBlur(nn.Module):
    """Random Gaussian blur, the same in all frames of a clip.

    Args:
        sigma: range of the standard deviation in pixels.
        probability: probability for each clip.

    Raises:
        ValueError: ``sigma`` is not a range of positive numbers, or ``probability`` is outside [0, 1].
    """

    def __init__(self, sigma: tuple[float, float] = (0.1, 2.0), probability: float = 0.5):
        super().__init__()
        _check_range("sigma", sigma)
        _check_probability("augment.probability", probability)
        self.sigma, self.probability = (float(sigma[0]), float(sigma[1])), probability

    def forward(self, video: Tensor) -> Tensor:
        """(B, C, T, H, W) -> the same shape."""
        chosen = (torch.rand(len(video)) < self.probability).tolist()
        sigmas = torch.empty(len(video)).uniform_(*self.sigma).tolist()
        return torch.stack([_blurred(clip, s) if blur else clip for clip, s, blur in zip(video, sigmas, chosen)])


def _blurred(clip: Tensor, sigma: float) -> Tensor:
    """Blurs (C, T, H, W) with a kernel of three standard deviations to either side; the border pixels are repeated."""
    reach = max(1, math.ceil(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=clip.dtype, device=clip.device) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    images = F.pad(clip.flatten(0, 1)[:, None], (reach, reach, reach, reach), mode="replicate")
    images = F.conv2d(F.conv2d(images, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return images[:, 0].view_as(clip)


class Mixing(nn.Module):
    """MixUp and CutMix: mixes each clip with the clip at the mirrored index of the batch, all with the same weight.

    MixUp (Zhang et al., arXiv 1710.09412) is a weighted sum; CutMix (Yun et al., arXiv 1905.04899) copies a box of the
    mirrored clip, the same in all frames, into the clip. One of the two is drawn for each batch, with its weight from a
    Beta distribution. The defaults are those of the fine-tuning of VideoMAE.

    Args:
        mixup_alpha, cutmix_alpha: both parameters of the Beta distribution; 0 disables MixUp or CutMix.
        switch_prob: probability of CutMix if both are enabled.
        prob: probability that a batch is mixed.

    Raises:
        ValueError: an alpha is negative, both are 0, or a probability is outside [0, 1].
    """

    def __init__(
        self, mixup_alpha: float = 0.8, cutmix_alpha: float = 1.0, switch_prob: float = 0.5, prob: float = 1.0
    ):
        super().__init__()
        if min(mixup_alpha, cutmix_alpha) < 0 or max(mixup_alpha, cutmix_alpha) == 0:
            raise ValueError(
                f"mixing.mixup_alpha={mixup_alpha} and mixing.cutmix_alpha={cutmix_alpha} must be at least 0, and one "
                "of them above 0; to disable mixing, set task.mixing=null."
            )
        _check_probability("mixing.switch_prob", switch_prob)
        _check_probability("mixing.prob", prob)
        self.mixup_alpha, self.cutmix_alpha, self.switch_prob, self.prob = mixup_alpha, cutmix_alpha, switch_prob, prob

    def forward(self, video: Tensor) -> tuple[Tensor, float]:
        """Mixes video (B, C, T, H, W).

        Returns:
            The mixed video and the weight of each original clip in [0, 1]; for CutMix, the fraction of its pixels
            that are kept. The weight in an unmixed batch is 1.
        """
        if torch.rand(()) >= self.prob:
            return video, 1.0
        cut = self.mixup_alpha == 0 or (self.cutmix_alpha > 0 and bool(torch.rand(()) < self.switch_prob))
        alpha = self.cutmix_alpha if cut else self.mixup_alpha
        own = torch.distributions.Beta(alpha, alpha).sample().item()
        return _cutmix(video, own) if cut else (torch.lerp(video.flip(0), video, own), own)


def _cutmix(video: Tensor, own: float) -> tuple[Tensor, float]:
    """CutMix with a box of about ``1 - own`` of the area, clipped at the borders of the image."""
    height, width = video.shape[-2:]
    half_height, half_width = (int(side * (1 - own) ** 0.5) // 2 for side in (height, width))
    y, x = (int(torch.randint(side, ())) for side in (height, width))
    rows = slice(max(y - half_height, 0), min(y + half_height, height))
    columns = slice(max(x - half_width, 0), min(x + half_width, width))
    mixed = video.clone()
    mixed[..., rows, columns] = video[..., rows, columns].flip(0)
    return mixed, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)


def soft_targets(labels: Tensor, num_classes: int, own: float = 1.0, smoothing: float = 0.0) -> Tensor:
    """Target probabilities (B, num_classes) of a batch, mixed by :class:`Mixing`, with labels long (B,).

    Args:
        labels: labels of the clips before mixing.
        num_classes: number of classes.
        own: weight of each original clip, as returned by :class:`Mixing`.
        smoothing: label smoothing, spread over all classes, the correct one included (Szegedy et al., arXiv
            1512.00567).
    """
    one_hot = torch.nn.functional.one_hot(labels, num_classes).float()
    smooth = one_hot * (1 - smoothing) + smoothing / num_classes
    return own * smooth + (1 - own) * smooth.flip(0)


def repeat_clips(batch: dict, times: int) -> dict:
    """Repeats each clip of a collated batch ``times`` in a row, with all its entries."""

    def repeated(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.repeat_interleave(times, dim=0)
        if isinstance(value, dict):
            return {key: repeated(part) for key, part in value.items()}
        return [item for item in value for _ in range(times)]  # strings

    return batch if times == 1 else repeated(batch)
