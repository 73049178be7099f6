"""LightningDataModule of a run: dataloaders and the position from which a run resumes.

The order of an epoch is a pure function of (seed, epoch), cut into global batches, which are divided among the ranks
(``batches.py``). The same position therefore means the same clips for any number of workers or ranks, and a resumed run
seeks to it instead of replaying batches.

The position is part of the DataModule's state. Lightning could also store the state of a dataloader, but it loads it
only in mid-epoch, and drops it if the dataloader was created before the checkpoint was read.
"""

import os
from collections.abc import Iterator
from functools import partial
from typing import cast

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader, Dataset

from blueberry_video.data.batches import ByEpoch, EvaluationBatches, TrainBatches, collate
from blueberry_video.data.clips import Clips, check_same_order
from blueberry_video.parallel.ranks import data_rank, data_world_size


class DataModule(LightningDataModule):
    """Dataloaders for training, validation and test; use with ``Trainer(use_distributed_sampler=False)``.

    Args:
        train, val, test: map-style datasets of clips. Optional methods of a dataset (see ``Clips``) define its batches
            and the clips of each epoch.
        batch_size: clips per step and rank; ignored by ``Buckets``, which have a batch size per bucket.
        num_workers: loader processes per rank; 0 loads in the training process.
        seed: seed of the order of the training clips.
        val_batch_size: largest batch in validation and test; None: ``batch_size``.
        drop_last: drop the clips of an epoch that do not fill a global batch. Otherwise the last batch is smaller, and
            repeats up to (world size - 1) clips so that it divides among the ranks.

    Validation and test show every clip exactly once, in order, in batches of nearly equal size and the same number on
    every rank. The parts of a mixture alternate.

    Raises:
        ValueError: a value out of range, or classes that are numbered differently; when loading: a dataset or a part
            smaller than a global batch, videos of different shapes in a batch, or a position for another batch size,
            seed or dataset.
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
                raise ValueError(f"data.{key}={value} must be at least {least}.")
        for key, dataset in (("val", val), ("test", test)):
            check_same_order(getattr(train, "classes", {}), getattr(dataset, "classes", {}), key)
        self.train, self.val, self.test = train, val, test
        self.batch_size, self.num_workers, self.seed, self.drop_last = batch_size, num_workers, seed, drop_last
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self._sampler: TrainBatches | None = None
        self._resume_at = (0, 0)

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Label -> class names in the training set."""
        return getattr(self.train, "classes", {})

    @property
    def reversal_pairs(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """Label -> pairs of classes that are time reversals of each other, in the training set."""
        return getattr(self.train, "reversal_pairs", {})

    @property
    def action_names(self) -> tuple[str, ...]:
        """Names of the actions in the training set, in the order of their indices."""
        return getattr(self.train, "action_names", ())

    def list_skipped_in(self, path: str) -> None:
        """Sets the CSV file in which datasets list skipped broken files."""
        for dataset in filter(None, (self.train, self.val, self.test)):
            if hasattr(dataset, "skipped_file"):
                dataset.skipped_file = path

    def prepare_data(self) -> None:
        """Fills the clip caches; runs in one process on each machine."""
        for dataset in filter(None, (self.train, self.val, self.test)):
            if hasattr(dataset, "prepare"):
                dataset.prepare(num_workers=len(os.sched_getaffinity(0)))

    def setup(self, stage: str) -> None:
        """Prints how the clips are divided into buckets, before training."""
        self._resume_at = (0, 0)  # Lightning calls this before it loads a checkpoint
        for split, dataset in (("training", self.train), ("validation", self.val)) if stage == "fit" else ():
            if hasattr(dataset, "describe"):
                rank_zero_only(print)(f"{split}: {dataset.describe()}")

    def train_dataloader(self) -> DataLoader:
        self._sampler = self._train_batches()
        self._sampler.resume_at = self._resume_at
        return _LazyLoader(
            ByEpoch(self.train),
            batch_sampler=self._sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
            generator=torch.Generator(),  # else every epoch draws from the global one, and a resumed run once more
        )

    def val_dataloader(self) -> DataLoader:
        return self._evaluation(self.val)

    def test_dataloader(self) -> DataLoader:
        if self.test is None:
            raise ValueError("data.test is not set: give the DataModule a test dataset, or do not run the test loop.")
        return self._evaluation(self.test)

    def state_dict(self) -> dict:
        """Position (epoch and finished batches in it) and everything that determines the batches."""
        if self._sampler is None or self.trainer is None:
            return {}
        epoch, done = self._resume_at  # until this run has read a batch
        if self._sampler.running_epoch is not None:
            epoch = self._sampler.running_epoch
            done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        if done >= self.trainer.num_training_batches:
            epoch, done = epoch + 1, 0
        return {"epoch": epoch, "batches": done, **self._sampler.order}

    def load_state_dict(self, state_dict: dict) -> None:
        order = self._train_batches().order if state_dict["batches"] else {}
        changed = [
            f"{key} was {state_dict.get(key)} and is {now}" for key, now in order.items() if state_dict.get(key) != now
        ]
        if changed:
            raise ValueError(
                f"The checkpoint was saved after {state_dict['batches']} batches of epoch {state_dict['epoch']}, and "
                f"since then {' and '.join(changed)}, so the position refers to other clips: restore the setting "
                "(batch_size times world size must stay the same), or start a new run from these weights."
            )
        self._resume_at = (state_dict["epoch"], state_dict["batches"])
        if self._sampler is not None:
            self._sampler.resume_at = self._resume_at

    def _train_batches(self) -> TrainBatches:
        make = getattr(self.train, "train_batches", partial(TrainBatches, len(self.train)))
        return make(self.batch_size, self.seed, self._rank, self._world_size, self.drop_last)

    def _evaluation(self, dataset: Clips) -> DataLoader:
        make = getattr(dataset, "evaluation_batches", partial(EvaluationBatches, len(dataset)))
        return DataLoader(
            cast(Dataset, dataset),
            batch_sampler=make(self.val_batch_size, self._rank, self._world_size),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
            generator=torch.Generator(),
        )

    @property
    def _rank(self) -> int:
        return data_rank(self.trainer) if self.trainer is not None else 0

    @property
    def _world_size(self) -> int:
        return data_world_size(self.trainer) if self.trainer is not None else 1


class _LazyLoader(DataLoader):
    """DataLoader that starts loading at the first ``next``: Lightning calls ``iter`` before ``set_epoch``."""

    def __iter__(self) -> Iterator:  # type: ignore[override]
        yield from super().__iter__()

    def state_dict(self) -> dict:
        """Empty, because the DataModule stores the position. Without this method Lightning warns that the loader cannot
        resume."""
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        """Does nothing, because ``state_dict`` is empty."""
