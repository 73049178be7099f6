"""Mixing the clips of a batch with each other, pixels and labels alike: MixUp and CutMix."""

import torch
from torch import Tensor, nn


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
