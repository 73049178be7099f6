"""Accuracy, multi-view accuracy and mean class recall, and frame shuffling as a control of motion."""

import re
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

VIEW = re.compile(r".+#\d+(\.\d+)?")  # id of one view of a video


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Top-1 accuracy in [0, 1], a scalar, of ``logits`` (N, classes) against ``labels`` (N,)."""
    return (logits.argmax(dim=1) == labels).float().mean()


def recalled_by_class(logits: Tensor, labels: Tensor, k: int = 5, valid_classes: Sequence[int] | None = None) -> Tensor:
    """Returns the number of recalled clips and of all clips per class: long (2, classes), to be summed over batches.

    A clip is recalled if its class is among the ``k`` highest logits.

    Args:
        logits: (N, classes); ``k`` may exceed the number of classes.
        labels: (N,) long.
        valid_classes: classes that may be predicted, such as those that occur in the validation set of
            EPIC-KITCHENS-100; ``None``: all.

    Raises:
        ValueError: for a label outside the classes, or a valid class outside them.
    """
    classes = logits.shape[1]
    if valid_classes is not None:
        if not valid_classes or not 0 <= min(valid_classes) <= max(valid_classes) < classes:
            raise ValueError(f"valid_classes={list(valid_classes)} must be in 0 to {classes - 1}.")
        valid = torch.zeros(classes, dtype=torch.bool, device=logits.device)
        valid[list(valid_classes)] = True
        logits = logits.masked_fill(~valid, -torch.inf)
    if ((labels < 0) | (labels >= classes)).any():
        raise ValueError(
            f"labels from {int(labels.min())} to {int(labels.max())} must be in 0 to {classes - 1}, the classes of the "
            "logits: set model.num_classes to the number of classes of the data."
        )
    found = (logits.topk(min(k, classes), dim=1).indices == labels[:, None]).any(dim=1)
    return torch.stack([labels[found].bincount(minlength=classes), labels.bincount(minlength=classes)])


def mean_class_recall(counts: Tensor) -> Tensor:
    """Mean recall at k over the classes that occur, a scalar in [0, 1].

    This is the metric of action anticipation on EPIC-KITCHENS-100 (arXiv 2006.13256).

    Args:
        counts: (2, classes), sum of the outputs of :func:`recalled_by_class`.
    """
    recalled, clips = counts[:, counts[1] > 0]
    return (recalled / clips).mean()


def within_pair_correct(logits: Tensor, labels: Tensor, pairs: tuple[tuple[int, int], ...]) -> Tensor:
    """Returns which clips are distinguished from their reversal: bool (M,) for the M clips with a class in a pair.

    Only the two logits of the clip's pair are compared, so chance level is 0.5. Classes that are each other played
    backwards contain the same frames, so a model that ignores frame order cannot exceed chance level, however well it
    separates the pairs.

    Args:
        logits: (N, classes).
        labels: (N,) long.
        pairs: pairs of classes that are each other played backwards.
    """
    correct = [labels.new_empty(0, dtype=torch.bool)]
    for first, second in pairs:
        rows = (labels == first) | (labels == second)
        predicts_first = logits[rows, first] > logits[rows, second]
        correct.append(predicts_first == (labels[rows] == first))
    return torch.cat(correct)


def shuffle_frames(video: Tensor, generator: torch.Generator | Sequence[int] | None = None) -> Tensor:
    """Shuffles the frames of each clip (B, C, T, H, W) in an independent random order, which removes the motion.

    ``generator`` draws all orders; with a seed for every clip, they do not depend on the batch.
    """
    if isinstance(generator, Sequence):
        generators = [torch.Generator().manual_seed(seed) for seed in generator]
        drawn = torch.stack([torch.rand(video.shape[2], generator=each) for each in generators])
    else:
        drawn = torch.rand(video.shape[0], video.shape[2], generator=generator)
    order = drawn.argsort(dim=1).to(video.device)
    return video.gather(2, order[:, None, :, None, None].expand_as(video))


class Means:
    """Means by name over the items of all batches and processes.

    Sums and numbers of items are reduced separately. Lightning's mean over processes truncates the number of clips to
    an integer, and torchmetrics' MeanMetric either drops NaN or ignores weights.
    """

    def __init__(self) -> None:
        self._totals: dict[str, tuple[Tensor, int]] = {}  # sum and number of items

    def add(self, name: str, value: Tensor, count: int) -> None:
        """Adds the mean ``value`` of ``count`` items, or a vector with one value per item."""
        value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
        added, count = (value.sum(), len(value)) if value.ndim else (value * count, count)
        total, known = self._totals.get(name, (torch.zeros_like(added), 0))
        self._totals[name] = total + added, known + count

    def compute(self) -> dict[str, Tensor]:
        """Returns the means, and resets; names without any item are left out.

        All processes must call it, with the same names; each gets the same result.
        """
        totals, self._totals = self._totals, {}
        if not totals:
            return {}
        pairs = torch.stack([torch.stack([total, total.new_tensor(count)]) for total, count in totals.values()])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(pairs)
        return {name: total / count for name, (total, count) in zip(totals, pairs, strict=True) if count > 0}


class ClassCounts:
    """Number of items of each class per label, over batches and processes."""

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}

    def add(self, labels: dict[str, Tensor]) -> None:
        """Adds a batch: label -> classes, long (N,)."""
        for name, classes in labels.items():
            counts, known = classes.bincount(), self._counts.get(name, classes.new_zeros(0))
            size = max(len(counts), len(known))
            self._counts[name] = F.pad(counts, (0, size - len(counts))) + F.pad(known, (0, size - len(known)))

    def majority_shares(self) -> dict[str, Tensor]:
        """Returns label -> share of the most frequent class over the items of all processes, and resets.

        All processes must call it; each gets the same result.
        """
        gathered = [{name: counts.cpu() for name, counts in self._counts.items()}]
        self._counts = {}
        if dist.is_available() and dist.is_initialized():
            gathered = gathered * dist.get_world_size()
            dist.all_gather_object(gathered, gathered[0])
        shares = {}
        for name in gathered[0]:
            size = max(len(counts[name]) for counts in gathered)
            total = torch.stack([F.pad(counts[name], (0, size - len(counts[name]))) for counts in gathered]).sum(dim=0)
            shares[name] = total.max() / total.sum()
        return shares


class CodeCounts:
    """Number of times that each code of a codebook occurs, over batches and processes.

    Args:
        vocabulary: number of codes.
    """

    def __init__(self, vocabulary: int):
        self.vocabulary, self._counts = vocabulary, torch.zeros(vocabulary, dtype=torch.long)

    def add(self, ids: Tensor) -> None:
        """Adds ids of any shape, long."""
        self._counts = self._counts.to(ids.device) + ids.flatten().bincount(minlength=self.vocabulary)

    def compute(self) -> Tensor:
        """Returns the counts (vocabulary,) of all processes, and resets; all processes must call it."""
        counts, self._counts = self._counts, torch.zeros_like(self._counts)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        return counts


class _Views(NamedTuple):
    """M views of a batch: ids, and per label softmax scores (M, classes) and true classes (M,)."""

    ids: list[str]
    scores: dict[str, Tensor]
    truth: dict[str, Tensor]


class ViewScores:
    """Multi-view accuracy: softmax scores are averaged over the views (clips and crops) of each video.

    This is the usual test protocol, such as 5 clips x 3 crops on Kinetics (github.com/MCG-NJU/VideoMAE).

    The id of a view is the id of its video, ``#``, the clip number and, if there are several crops, ``.`` and the crop
    number: ``cooking/17.mp4#4.2``. Clips with other ids are ignored. A repeated view, as from samplers that pad a
    batch, counts once.
    """

    def __init__(self) -> None:
        self._batches: list[_Views] = []

    def add(self, ids: list[str], logits: dict[str, Tensor], labels: dict[str, Tensor]) -> None:
        """Adds a batch: ``ids`` of its B clips, ``logits`` label -> (B, classes), ``labels`` label -> (B,)."""
        rows = [row for row, clip in enumerate(ids) if VIEW.fullmatch(clip)]
        if rows:
            scores = {name: values[rows].float().softmax(dim=1).cpu() for name, values in logits.items()}
            truth = {name: labels[name][rows].cpu() for name in logits}
            self._batches.append(_Views([ids[row] for row in rows], scores, truth))

    def accuracies(self) -> dict[str, float]:
        """Returns label -> accuracy in [0, 1] over the videos of all processes, or ``{}`` without views, and resets.

        All processes must call it; each gets the same result.
        """
        batches, self._batches = self._batches, []
        if dist.is_available() and dist.is_initialized():
            gathered: list = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, batches)
            batches = list(chain.from_iterable(gathered))
        if not batches:
            return {}
        row_of = {view: row for row, view in enumerate(view for batch in batches for view in batch.ids)}
        rows = torch.tensor(list(row_of.values()))
        names = [view.rpartition("#")[0] for view in row_of]
        index_of = {name: index for index, name in enumerate(dict.fromkeys(names))}
        videos = torch.tensor([index_of[name] for name in names])
        found = {}
        for label in batches[0].scores:
            scores = torch.cat([batch.scores[label] for batch in batches])[rows]
            truth = torch.cat([batch.truth[label] for batch in batches])[rows]
            total = torch.zeros(len(index_of), scores.shape[1]).index_add_(0, videos, scores)
            labels = torch.zeros(len(index_of), dtype=torch.long).index_copy_(0, videos, truth)
            found[label] = accuracy(total, labels).item()
        return found
