"""Mixture of datasets with items of different shapes, such as images and clips."""

import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping

from blueberry_video.data.batches import MixedEvaluationBatches, TrainBatches, WeightedTrainBatches
from blueberry_video.data.clips import Clips, Wrapper, at_epoch, check_index


class Mixture(Wrapper):
    """Concatenation of datasets that never share a batch.

    In training the parts appear in the proportions ``shares`` (see ``WeightedTrainBatches``). In validation every item
    appears once.

    Args:
        parts: name -> map-style dataset.
        shares: name -> share of the training batches, above 0, in any unit; None: proportional to the sizes of the
            parts.

    Attributes:
        parts: as passed.
        part_sizes: name -> number of items.
        shares: name -> share; they add up to 1.
        classes, reversal_pairs: union over the parts.
        varies_by_epoch: True if any part differs between epochs.

    Raises:
        ValueError: no parts; a part that is empty or a Mixture; shares with other names, or not above 0; parts with
            different classes or reversal pairs for the same label.
    """

    def __init__(self, parts: Mapping[str, Clips], shares: Mapping[str, float] | None = None):
        if not parts:
            raise ValueError("parts is empty: name at least one dataset.")
        self.parts = dict(parts)
        self.sources = list(self.parts.values())
        for name, part in self.parts.items():
            if isinstance(part, Mixture):
                raise ValueError(f"parts.{name} is a Mixture: list its parts here, each with its share.")
        self.part_sizes = {name: len(part) for name, part in self.parts.items()}
        if empty := [name for name, size in self.part_sizes.items() if not size]:
            raise ValueError(f"parts.{empty[0]} is empty: give it items, or remove the part.")
        self.shares = _normalized(self.part_sizes if shares is None else shares, self.parts)
        self.classes: dict[str, tuple[str, ...]] = _union("classes", self.parts)
        # a part without motion, such as images, has no pairs for the label: that is no disagreement
        self.reversal_pairs: dict[str, tuple[tuple[int, int], ...]] = _union("reversal_pairs", self.parts)
        self.varies_by_epoch = any(getattr(part, "varies_by_epoch", False) for part in self.sources)
        self._ends = list(itertools.accumulate(self.part_sizes.values()))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict:
        name, item = self.locate(index)
        return self.parts[name][item]

    def sample(self, index: int, epoch: int) -> dict:
        """Item ``index`` in epoch ``epoch``."""
        name, item = self.locate(index)
        return at_epoch(self.parts[name], item, epoch)

    def locate(self, index: int) -> tuple[str, int]:
        """Returns (name of the part, index within the part).

        Raises:
            IndexError: outside 0 to len - 1.
        """
        check_index(index, len(self))
        number = bisect_right(self._ends, index)
        name = list(self.parts)[number]
        return name, index - self._ends[number] + self.part_sizes[name]

    def train_batches(
        self, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, drop_last: bool = True
    ) -> TrainBatches:
        """Batch sampler for training: each batch from one part, the parts in their shares."""
        return WeightedTrainBatches(self.part_sizes, self.shares, batch_size, seed, rank, world_size, drop_last)

    def evaluation_batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> MixedEvaluationBatches:
        """Batch sampler for validation: each batch from one part, the parts alternating."""
        return MixedEvaluationBatches(self.part_sizes, dict.fromkeys(self.parts, batch_size), rank, world_size)


def _normalized(shares: Mapping[str, float], parts: Mapping[str, Clips]) -> dict[str, float]:
    if shares.keys() != parts.keys():
        raise ValueError(
            f"shares has the names {', '.join(shares) or '(none)'} and parts has {', '.join(parts)}: give every part "
            "one share."
        )
    for name, share in shares.items():
        if not 0 < share < math.inf:
            raise ValueError(f"shares.{name}={share} must be above 0 and finite: use 0.5, or remove the part.")
    return {name: shares[name] / sum(shares.values()) for name in parts}


def _union(attribute: str, parts: Mapping[str, Clips]) -> dict:
    """Union over the parts of an attribute label -> value; parts with the same label must agree."""
    owners: dict[str, str] = {}
    union: dict = {}
    for name, part in parts.items():
        for label, value in getattr(part, attribute, {}).items():
            first = owners.setdefault(label, name)
            if union.setdefault(label, value) != value:
                raise ValueError(
                    f"parts.{first} and parts.{name} have different {attribute} for the label {label!r} "
                    f"({union[label]} and {value}), so class ids would be ambiguous: use the same ones in both, or "
                    "rename the label."
                )
    return union
