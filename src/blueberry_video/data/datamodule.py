"""The LightningDataModule: the loaders of a run, and where a resumed run goes on.

The order of an epoch is a pure function of (seed, epoch), cut into global batches and these into one slice for each
rank (``batches.py``); so the same position means the same clips whatever the number of workers or ranks. A resumed run
seeks to its position instead of replaying batches.

The position travels in the DataModule's own state. Lightning would also keep a loader's state, but loads it only where
it judges the run to be in mid-epoch, and drops it where something has asked for the loader before the checkpoint was
read.
"""

import os
from collections.abc import Iterator
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader, Dataset

from blueberry_video.data.batches import (
    ByEpoch,
    EvaluationBatches,
    MixedEvaluationBatches,
    MixedTrainBatches,
    TrainBatches,
    collate,
)
from blueberry_video.data.buckets import BucketEvaluationBatches, Buckets, BucketTrainBatches
from blueberry_video.data.clip_cache import Clips
from blueberry_video.data.mixture import Mixture


class DataModule(LightningDataModule):
    """Serves batches of clips; use with ``Trainer(use_distributed_sampler=False)``.

    Args:
        train, val, test: map-style datasets of clips. A dataset with a method ``sample(index, epoch)`` is read through
            it. Of a ``Mixture`` every batch comes from one part, of ``Buckets`` with a size of its own.
        batch_size: clips a step on each rank; counts for nothing where the data are ``Buckets``.
        num_workers: loading processes on each rank; 0 loads in the training process.
        seed: of the order of the training clips.
        val_batch_size: largest batch in validation and test; None means ``batch_size``.
        drop_last: leave out the clips of an epoch that do not fill a global batch. Otherwise the last batch is
            smaller, and repeats up to (world size - 1) clips so that it divides among the ranks.

    Validation and test show every clip exactly once, in order, in batches of nearly equal size, equally many on each
    rank; the parts of a mixture take turns.

    Raises:
        ValueError: a value out of range; when loading: a dataset or a part smaller than a global batch, videos of
            different shapes in a batch, or a position that belongs to another batch size, seed or dataset.
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
        """Tells, before a training, how the clips fall into buckets."""
        self._resume_at = (0, 0)  # Lightning calls this before it loads a checkpoint
        for split, dataset in (("training", self.train), ("validation", self.val)) if stage == "fit" else ():
            if isinstance(dataset, Buckets):
                rank_zero_only(print)(f"{split}: {dataset.describe()}")

    def train_dataloader(self) -> DataLoader:
        how = (self.seed, self._rank, self._world_size, self.drop_last)
        if isinstance(self.train, Buckets):
            self._sampler = BucketTrainBatches(self.train.part_sizes, list(self.train.batch_sizes.values()), *how)
        elif isinstance(self.train, Mixture):
            shares = list(self.train.shares.values())
            self._sampler = MixedTrainBatches(self.train.part_sizes, shares, self.batch_size, *how)
        else:
            self._sampler = TrainBatches(len(self.train), self.batch_size, *how)
        self._sampler.resume_at = self._resume_at
        return _LazyLoader(
            ByEpoch(self.train),
            batch_sampler=self._sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
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
            f"{key} was {state_dict.get(key)} and is {now}"
            for key, now in self._order().items()
            if state_dict.get(key) != now
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

    def _order(self) -> dict[str, Any]:
        order = {
            "clips": len(self.train),
            "global_batch": self.batch_size * self._world_size,
            "seed": self.seed,
        }
        if isinstance(self.train, Buckets):
            buckets = {"part_sizes": self.train.part_sizes, "batch_sizes": self.train.batch_sizes}
            return {**order, **buckets, "world_size": self._world_size, "drop_last": self.drop_last}
        if not isinstance(self.train, Mixture):
            return order
        return {**order, "part_sizes": self.train.part_sizes, "shares": self.train.shares, "drop_last": self.drop_last}

    def _evaluation(self, dataset: Clips) -> DataLoader:
        how = (self.val_batch_size, self._rank, self._world_size)
        batches: EvaluationBatches | MixedEvaluationBatches
        if isinstance(dataset, Buckets):
            batch_sizes = list(dataset.batch_sizes.values())
            batches = BucketEvaluationBatches(list(dataset.part_sizes.values()), batch_sizes, *how[1:])
        elif isinstance(dataset, Mixture):
            batches = MixedEvaluationBatches(list(dataset.part_sizes.values()), *how)
        else:
            batches = EvaluationBatches(len(dataset), *how)
        return DataLoader(
            cast(Dataset, dataset),
            batch_sampler=batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
            generator=torch.Generator(),
        )

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1


class _LazyLoader(DataLoader):
    """Begins to load when the first batch is asked for: Lightning calls ``iter`` before it has told the epoch."""

    def __iter__(self) -> Iterator:  # type: ignore[override]
        yield from super().__iter__()

    def state_dict(self) -> dict:
        """Empty: the DataModule keeps the position. Lightning warns that a loader without this cannot resume."""
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        """Reads nothing, as ``state_dict`` wrote nothing."""
