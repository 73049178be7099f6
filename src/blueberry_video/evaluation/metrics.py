"""Accuracies, and the control that a claim about motion must survive."""

import torch
from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share in [0, 1], a scalar, of rows of ``logits`` (N, classes) whose largest entry is that of ``labels`` (N,)."""
    return (logits.argmax(dim=1) == labels).float().mean()


def within_pair_correct(logits: Tensor, labels: Tensor, pairs: tuple[tuple[int, int], ...]) -> Tensor:
    """Which clips are told from their reversal: bool (M,) for the M clips whose class is in a pair; the chance of
    each is 0.5.

    Only the two logits of the clip's own pair count. Classes that are each other played backwards hold the same
    frames, so a model that ignores the order of frames cannot do better than chance here, however well it does
    between pairs.

    Args:
        logits: (N, classes).
        labels: (N,) long.
        pairs: the pairs of classes.
    """
    correct = [labels.new_empty(0, dtype=torch.bool)]
    for first, second in pairs:
        rows = (labels == first) | (labels == second)
        says_first = logits[rows, first] > logits[rows, second]
        correct.append(says_first == (labels[rows] == first))
    return torch.cat(correct)


def shuffle_frames(video: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Puts the frames of each clip (B, C, T, H, W) in a random order of its own:

    the same pictures without their motion.
    """
    order = torch.rand(video.shape[0], video.shape[2], generator=generator).argsort(dim=1).to(video.device)
    return video.gather(2, order[:, None, :, None, None].expand_as(video))
