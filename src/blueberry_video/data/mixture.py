"""Several datasets trained on together, such as images and clips, whose items do not fit into one batch."""

import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping

from torch.utils.data import Dataset

from blueberry_video.data.batches import at_epoch
from blueberry_video.data.clip_cache import Clips


class Mixture(Dataset):
    """Map-style dataset of the items of all ``parts``, one part after the other.

    A DataModule draws every batch from one part, and so many batches from each as ``shares`` says
    (``batches.MixedTrainBatches`` has the exact rule); in validation every item comes once, and no batch mixes parts.

    Args:
        parts: name -> map-style dataset.
        shares: name -> share of the training batches, above 0, in any unit; None goes by the sizes of the parts.

    Attributes:
        parts: as given.
        part_sizes: name -> items.
        shares: name -> share, adding up to 1.
        classes, reversal_pairs: of all parts together.
        varies_by_epoch: whether any part shows other items in each epoch.

    Raises:
        ValueError: no parts, an empty or a mixed one; shares for other parts, or not above 0; parts that disagree on
            the classes, or the reversal pairs, of a label that both have.
    """

    def __init__(self, parts: Mapping[str, Clips], shares: Mapping[str, float] | None = None):
        if not parts:
            raise ValueError("parts is empty, so there is nothing to mix: name at least one dataset.")
        self.parts = dict(parts)
        for name, part in self.parts.items():
            if isinstance(part, Mixture):
                raise ValueError(f"parts.{name} is a Mixture itself: list its parts here, each with its share.")
        self.part_sizes = {name: len(part) for name, part in self.parts.items()}
        if empty := [name for name, size in self.part_sizes.items() if not size]:
            raise ValueError(f"parts.{empty[0]} is empty: give it items, or remove the part.")
        self.shares = _normalised(self.part_sizes if shares is None else shares, self.parts)
        self.classes: dict[str, tuple[str, ...]] = _union("classes", self.parts)
        # a part without motion, such as images, has the label's pairs nowhere: no disagreement
        self.reversal_pairs: dict[str, tuple[tuple[int, int], ...]] = _union("reversal_pairs", self.parts)
        self.varies_by_epoch = any(getattr(part, "varies_by_epoch", False) for part in self.parts.values())
        self._ends = list(itertools.accumulate(self.part_sizes.values()))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict:
        name, place = self.locate(index)
        return self.parts[name][place]

    def sample(self, index: int, epoch: int) -> dict:
        """Item ``index`` as epoch ``epoch`` shows it."""
        name, place = self.locate(index)
        return at_epoch(self.parts[name], place, epoch)

    def locate(self, index: int) -> tuple[str, int]:
        """(name of the part, index in it) of item ``index``.

        Raises:
            IndexError: outside 0 to len - 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside this mixture of {len(self)} items.")
        number = bisect_right(self._ends, index)
        name = list(self.parts)[number]
        return name, index - self._ends[number] + self.part_sizes[name]

    def prepare(self, num_workers: int = 0) -> None:
        """Fills the clip caches of the parts."""
        for part in self.parts.values():
            if hasattr(part, "prepare"):
                part.prepare(num_workers=num_workers)

    @property
    def skipped_file(self) -> str | None:
        """Where the parts list files that they skip; None where none does."""
        files = (getattr(part, "skipped_file", None) for part in self.parts.values())
        return next(filter(None, files), None)

    @skipped_file.setter
    def skipped_file(self, path: str | None) -> None:
        for part in self.parts.values():
            if hasattr(part, "skipped_file"):
                part.skipped_file = path


def _normalised(shares: Mapping[str, float], parts: Mapping[str, Clips]) -> dict[str, float]:
    if shares.keys() != parts.keys():
        raise ValueError(
            f"shares has {', '.join(shares) or 'no names'} and parts has {', '.join(parts)}: give every part its share."
        )
    for name, share in shares.items():
        if not 0 < share < math.inf:
            raise ValueError(f"shares.{name}={share} is not above 0: give a share such as 0.5, or remove the part.")
    return {name: shares[name] / sum(shares.values()) for name in parts}


def _union(attribute: str, parts: Mapping[str, Clips]) -> dict:
    """Label -> value of all parts; where two parts have a label, they must agree."""
    owners: dict[str, str] = {}
    union: dict = {}
    for name, part in parts.items():
        for label, value in getattr(part, attribute, {}).items():
            first = owners.setdefault(label, name)
            if union.setdefault(label, value) != value:
                raise ValueError(
                    f"parts.{first} and parts.{name} disagree on the {attribute} of the label {label!r} "
                    f"({union[label]} and {value}): the same number would mean two things. Give both the same, or the "
                    "label another name."
                )
    return union
