"""Interface of datasets of clips, and what several of them share."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch.utils.data import Dataset


class Clips(Protocol):
    """Map-style dataset of clips (docs/architecture.md, Clip).

    A dataset may define more. The code that uses these members looks them up by name:

    - ``sample(index, epoch)``: the clip in a given epoch; ``dataset[index]`` otherwise.
    - ``train_batches(batch_size, seed, rank, world_size, drop_last)`` and ``evaluation_batches(batch_size, rank,
      world_size)``: batch samplers of one rank; ``TrainBatches`` and ``EvaluationBatches`` otherwise.
    - ``classes``, ``reversal_pairs``: label -> class names, and pairs of classes that are time reversals of each other.
    - ``action_names``: names of the actions, in the order of their indices.
    - ``cache_key``: names everything that a clip depends on except its index.
    - ``varies_by_epoch``: True if clips differ between epochs.
    - ``prepare(num_workers)``: fills clip caches; called once on each machine before loading.
    - ``skipped_file``: CSV file in which skipped files are listed; assigned by the run.
    - ``describe()``: one line about the clips, printed before training.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict: ...


class KeyedClips(Clips, Protocol):
    """Dataset in which a clip depends only on ``cache_key`` and the index."""

    @property
    def cache_key(self) -> str: ...


class Wrapper(Dataset):
    """Base of datasets that read other datasets, the ``sources``: forwards ``prepare`` and ``skipped_file`` to them."""

    sources: Sequence[Clips]

    def prepare(self, num_workers: int = 0) -> None:
        """Fills the clip caches of the sources."""
        for source in self.sources:
            if hasattr(source, "prepare"):
                source.prepare(num_workers=num_workers)

    @property
    def skipped_file(self) -> str | None:
        """CSV file in which the sources list skipped files; None if there is none."""
        files = (getattr(source, "skipped_file", None) for source in self.sources)
        return next(filter(None, files), None)

    @skipped_file.setter
    def skipped_file(self, path: str | None) -> None:
        for source in self.sources:
            if hasattr(source, "skipped_file"):
                source.skipped_file = path


def at_epoch(dataset: Clips, index: int, epoch: int) -> dict:
    """Returns ``dataset.sample(index, epoch)`` if the dataset has this method, else ``dataset[index]``."""
    sample = getattr(dataset, "sample", None)
    if sample is None or "epoch" not in inspect.signature(sample).parameters:  # World.sample(index) returns all views
        return dataset[index]
    return sample(index, epoch)


def check_same_order(train: Mapping[str, Sequence[str]], other: Mapping[str, Sequence[str]], key: str) -> None:
    """Raises a ValueError if the data set of ``data.<key>`` numbers classes differently than ``data.train``; it may
    lack the last ones."""
    for label, names in other.items():
        known = tuple(train.get(label, ()))
        if known and tuple(names) != known[: len(names)]:
            number = next(i for i, name in enumerate(names) if known[i : i + 1] != (name,))
            here = repr(known[number]) if number < len(known) else "no class"
            raise ValueError(
                f"data.{key} has {names[number]!r} as class {number} of {label}, which is {here} in data.train: name "
                f"the classes of all sets in classes.json, or in data.train.classes.{label} and "
                f"data.{key}.classes.{label}."
            )


def check_index(index: int, size: int) -> None:
    """Raises an IndexError unless 0 <= ``index`` < ``size``."""
    if not 0 <= index < size:
        raise IndexError(f"index {index} is outside this dataset of {size} clips.")
