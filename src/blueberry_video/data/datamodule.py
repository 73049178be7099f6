"""The LightningDataModule: which clips make which batch, and where a resumed run goes on.

The order of an epoch is a pure function of (seed, epoch), cut into global batches and these into one slice for each
rank; so the same position means the same clips whatever the number of workers or ranks. A resumed run seeks to its
position instead of replaying batches.

The position travels in the DataModule's own state. Lightning would also keep a loader's state, but loads it only where
it judges the run to be in mid-epoch, and drops it where something has asked for the loader before the checkpoint was
read.
"""

import os
from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from blueberry_video.data.clip_cache import Clips


class DataModule(LightningDataModule):
    """Serves batches of clips; use with ``Trainer(use_distributed_sampler=False)``.

    Args:
        train, val, test: map-style datasets of clips. A dataset with a method ``sample(index, epoch)`` is read through
            it.
        batch_size: clips a step on each rank.
        num_workers: loading processes on each rank; 0 loads in the training process.
        seed: of the order of the training clips.
        val_batch_size: largest batch in validation and test; None means ``batch_size``.
        drop_last: leave out the clips of an epoch that do not fill a global batch. Otherwise the last batch is
            smaller, and repeats up to (world size - 1) clips so that it divides among the ranks.

    Validation and test show every clip exactly once, in order, in batches of nearly equal size, equally many on each
    rank.

    Raises:
        ValueError: a value out of range; when loading: a dataset smaller than a global batch, or a position that
            belongs to another batch size, seed or dataset.
    """

    def __init__(
        self,
        train: Clips,
        val: Clips,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        val_batch_size: int | None = None,
        test: Clips | None = None,
        drop_last: bool = True,
    ):
        super().__init__()
        for key, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("val_batch_size", val_batch_size if val_batch_size is not None else batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"data.{key}={value} is too small: use at least {least}.")
        self.train, self.val, self.test = train, val, test
        self.batch_size, self.num_workers, self.seed, self.drop_last = batch_size, num_workers, seed, drop_last
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self._sampler: TrainBatches | None = None
        self._resume_at = (0, 0)

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Label -> class names, of the training set."""
        return getattr(self.train, "classes", {})

    @property
    def reversal_pairs(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """Label -> pairs of classes that are each other played backwards, of the training set."""
        return getattr(self.train, "reversal_pairs", {})

    def list_skipped_in(self, path: str) -> None:
        """Names the csv in which datasets that skip broken files list them."""
        for dataset in filter(None, (self.train, self.val, self.test)):
            if hasattr(dataset, "skipped_file"):
                dataset.skipped_file = path

    def prepare_data(self) -> None:
        """Fills the clip caches, in one process on each machine."""
        for dataset in filter(None, (self.train, self.val, self.test)):
            if hasattr(dataset, "prepare"):
                dataset.prepare(num_workers=len(os.sched_getaffinity(0)))

    def setup(self, stage: str) -> None:
        self._resume_at = (0, 0)  # Lightning calls this before it loads a checkpoint

    def train_dataloader(self) -> DataLoader:
        self._sampler = TrainBatches(
            len(self.train),
            self.batch_size,
            self.seed,
            rank=self._rank,
            world_size=self._world_size,
            drop_last=self.drop_last,
        )
        self._sampler.resume_at = self._resume_at
        return _LazyLoader(
            _ByEpoch(self.train),
            batch_sampler=self._sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else each epoch draws from the global one, and a resumed run once more
        )

    def val_dataloader(self) -> DataLoader:
        return self._evaluation(self.val)

    def test_dataloader(self) -> DataLoader:
        if self.test is None:
            raise ValueError(
                "data.test is not set, so there is nothing to test on: give the DataModule a test dataset."
            )
        return self._evaluation(self.test)

    def state_dict(self) -> dict:
        """The position: epoch and batches done in it, with what the batches depend on."""
        if self._sampler is None or self.trainer is None:
            return {}
        epoch, done = self._resume_at  # holds while this run has read nothing
        if self._sampler.running_epoch is not None:
            epoch = self._sampler.running_epoch
            done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        if done >= self.trainer.num_training_batches:
            epoch, done = epoch + 1, 0
        return {"epoch": epoch, "batches": done, **self._order()}

    def load_state_dict(self, state_dict: dict) -> None:
        changed = [
            f"{key} was {state_dict[key]} and is {now}" for key, now in self._order().items() if state_dict[key] != now
        ]
        if changed and state_dict["batches"]:
            raise ValueError(
                f"The checkpoint was written {state_dict['batches']} batches into epoch {state_dict['epoch']}, and "
                f"since then {' and '.join(changed)}: the position would mean other clips. Restore the setting "
                "(batch_size times world size must stay the same), or start from these weights as a new run."
            )
        self._resume_at = (state_dict["epoch"], state_dict["batches"])
        if self._sampler is not None:
            self._sampler.resume_at = self._resume_at

    def _order(self) -> dict[str, int]:
        return {
            "clips": len(self.train),
            "global_batch": self.batch_size * self._world_size,
            "seed": self.seed,
        }

    def _evaluation(self, dataset: Clips) -> DataLoader:
        batches = EvaluationBatches(len(dataset), self.val_batch_size, self._rank, self._world_size)
        return DataLoader(
            cast(Dataset, dataset),
            batch_sampler=batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1


class TrainBatches:
    """Batches of (epoch, index) of one rank; endless epochs, each begun anew by ``iter``.

    Args:
        size: clips in the dataset.
        batch_size: clips of one rank's batch.
        seed: with the epoch determines the order.
        rank, world_size: global batch b is the b-th run of batch_size · world_size clips of the order; a rank takes
            its slice.
        drop_last: whether the clips that do not fill a global batch are left out.

    Attributes:
        epoch: shown by the next ``iter``; set by ``set_epoch``.
        running_epoch: shown by the last ``iter``; None before the first.
        resume_at: (epoch, batches): in this epoch alone, begin after so many batches. ``len`` remains the whole
            epoch's.

    Raises:
        ValueError: there is not one batch.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, drop_last: bool = True
    ):
        self.global_batch = batch_size * world_size
        if size < (self.global_batch if drop_last else 1):
            raise ValueError(
                f"The training set has {size} clips, fewer than one batch of {self.global_batch} "
                f"(data.batch_size={batch_size} "
                f"on {world_size} ranks): lower data.batch_size, add clips, or set data.drop_last=false."
            )
        self.size, self.seed, self.rank, self.world_size, self.drop_last = size, seed, rank, world_size, drop_last
        self.epoch = 0
        self.running_epoch: int | None = None
        self.resume_at = (0, 0)

    def __len__(self) -> int:
        return self.size // self.global_batch if self.drop_last else -(-self.size // self.global_batch)

    @property
    def sampler(self) -> "TrainBatches":
        """Itself: Lightning calls ``set_epoch`` on a batch sampler's ``sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.running_epoch = self.epoch
        first = self.resume_at[1] if self.resume_at[0] == epoch else 0
        order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
        for batch in range(first, len(self)):
            clips = order[batch * self.global_batch : (batch + 1) * self.global_batch]
            clips = np.resize(
                clips, -(-len(clips) // self.world_size) * self.world_size
            )  # repeats clips of a last batch
            yield [(epoch, int(i)) for i in np.array_split(clips, self.world_size)[self.rank]]


class EvaluationBatches:
    """Every clip once, in order; equally many batches, of at most ``batch_size`` clips, on every rank.

    Raises:
        ValueError: fewer clips than ranks.
    """

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1):
        if size < world_size:
            raise ValueError(f"An evaluation set of {size} clips cannot be shared by {world_size} ranks: add clips.")
        self.size, self.rank, self.world_size = size, rank, world_size
        self.count = -(-size // (batch_size * world_size))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        for batch in np.array_split(np.arange(self.size), self.count):
            yield [int(i) for i in np.array_split(batch, self.world_size)[self.rank]]


class _ByEpoch(Dataset):
    """Reads clip (epoch, index). The epoch comes with the index, because a worker that lives on never hears of a new
    epoch."""

    def __init__(self, dataset: Clips):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: tuple[int, int]) -> dict:
        epoch, index = position
        if hasattr(self.dataset, "sample"):
            return self.dataset.sample(index, epoch)
        return self.dataset[index]


class _LazyLoader(DataLoader):
    """Begins to load when the first batch is asked for: Lightning calls ``iter`` before it has told the epoch."""

    def __iter__(self) -> Iterator:  # type: ignore[override]
        yield from super().__iter__()

    def state_dict(self) -> dict:
        """Empty: the DataModule keeps the position. Lightning warns that a loader without this cannot resume."""
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        """Reads nothing, as ``state_dict`` wrote nothing."""
