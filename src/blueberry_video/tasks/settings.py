"""Settings that every task has: optimization, and the clips that a model receives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Optimization:
    """Optimizer, learning rate and initial weights of a task.

    Args:
        optimizer: builds the optimizer from parameter groups; its ``weight_decay`` applies to matrices only.
        schedule: ``(step, total_steps) -> multiplier`` of the learning rate.
        lr_batch_size: global batch size that the learning rate refers to; at a different batch size the rate is scaled
            linearly. ``None``: no scaling. VideoMAE's published rates are for 256. Repeats do not count.
        layer_decay: factor on the learning rate from each layer of the encoder to the one before it, see
            :func:`~blueberry_video.optim.parameter_groups`; 1 for none.
        layer_decay_head: apply the factor once more to all layers, the head included, as OmniMAE.
        init_from: checkpoint or published weights to start from; ``None``: random weights.
    """

    optimizer: Callable[[list[dict]], Optimizer]
    schedule: Callable[[int, int], float]
    lr_batch_size: int | None = None
    layer_decay: float = 1.0
    layer_decay_head: bool = False
    init_from: str | Path | None = None


@dataclass(frozen=True)
class ClipInput:
    """Augmentation, repetition and normalization of the clips that a model receives.

    Args:
        augment: applied to training videos (B, C, T, H, W) in [0, 1] on the device.
        repeats: copies of each clip of a training batch, each augmented and masked independently: decoding a clip
            costs more than augmenting it again (Hoffer et al., arXiv 1901.09335).
        image_repeats: the same for batches of single frames.
        mean, std: of the normalization, per channel; ``None``: those of ImageNet.

    Raises:
        ValueError: for repeats below 1.
    """

    augment: nn.Module | None = None
    repeats: int = 1
    image_repeats: int = 1
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __post_init__(self) -> None:
        for key, times in (("repeats", self.repeats), ("image_repeats", self.image_repeats)):
            if times < 1:
                raise ValueError(f"task.input.{key}={times} must be at least 1: 1 uses every clip once.")
