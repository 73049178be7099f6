"""Batch samplers. The order is a pure function of (seed, epoch), so that a run can resume at any batch."""

import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, default_collate

from blueberry_video.data.clips import Clips, at_epoch


class TrainBatches:
    """Batch sampler of one rank for training: batches of (epoch, index); each ``iter`` is one epoch.

    Args:
        size: number of clips in the dataset.
        batch_size: clips per batch and rank.
        seed: seed of the order, together with the epoch.
        rank, world_size: global batch b is the b-th block of batch_size · world_size clips of the order, divided among
            the ranks.
        drop_last: drop the clips that do not fill a global batch.

    Attributes:
        epoch: epoch of the next ``iter``; set by ``set_epoch``.
        running_epoch: epoch of the last ``iter``; None before the first.
        resume_at: (epoch, batches): in this epoch only, skip that number of batches. ``len`` remains that of the whole
            epoch.

    Raises:
        ValueError: the dataset is smaller than one global batch.
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
    def clips_per_batch(self) -> float:
        """Mean number of clips of a global batch."""
        return float(self.global_batch) if self.drop_last else self.size / len(self)

    @property
    def sampler(self) -> "TrainBatches":
        """The object itself: Lightning calls ``set_epoch`` on the ``sampler`` of a batch sampler."""
        return self

    @property
    def order(self) -> dict[str, Any]:
        """Everything that determines the global batches of an epoch, for the checkpoint."""
        return {"clips": self.size, "global_batch": self.global_batch, "seed": self.seed}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.running_epoch = self.epoch
        first = self.resume_at[1] if self.resume_at[0] == epoch else 0
        for clips in itertools.islice(self.global_batches(epoch), first, None):
            # the last batch repeats clips until it divides among the ranks
            clips = np.resize(clips, -(-len(clips) // self.world_size) * self.world_size)
            yield [(epoch, int(i)) for i in np.array_split(clips, self.world_size)[self.rank]]

    def global_batches(self, epoch: int) -> Iterator[np.ndarray]:
        """Indices of each batch of all ranks together."""
        return self.one_pass([self.seed, epoch])

    def one_pass(self, entropy: list[int]) -> Iterator[np.ndarray]:
        """Global batches of one pass over the clips, in the random order of this seed sequence."""
        order = np.random.default_rng(entropy).permutation(self.size)
        for batch in range(len(self)):
            yield order[batch * self.global_batch : (batch + 1) * self.global_batch]


class WindowedTrainBatches(TrainBatches):
    """Batch sampler for clips in shards: shuffles the shards, and then the clips within each window of shards.

    The batches of a while read from few shards. Clips of distant shards never share a batch.

    Args:
        clips: indices of the dataset, shard by shard.
        counts: number of indices of each shard.
        window: shards that are shuffled together.
        batch_size, seed, rank, world_size, drop_last: see ``TrainBatches``.

    Raises:
        ValueError: the dataset is smaller than one global batch.
    """

    def __init__(
        self,
        clips: np.ndarray,
        counts: np.ndarray,
        window: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ):
        super().__init__(len(clips), batch_size, seed, rank, world_size, drop_last)
        self.clips, self.counts, self.window = clips, counts, window
        self.ends = np.cumsum(counts)

    @property
    def order(self) -> dict[str, Any]:
        shards = zlib.crc32(np.asarray(self.counts, np.int64).tobytes())
        return {**super().order, "shuffle_window": self.window, "shards": shards}

    def one_pass(self, entropy: list[int]) -> Iterator[np.ndarray]:
        random = np.random.default_rng(entropy)
        shards = random.permutation(len(self.counts))
        rest = np.empty(0, np.int64)
        for first in range(0, len(shards), self.window):
            chosen = shards[first : first + self.window]
            found = [self.clips[self.ends[shard] - self.counts[shard] : self.ends[shard]] for shard in chosen]
            rest = np.concatenate([rest, random.permutation(np.concatenate(found))])
            whole = len(rest) // self.global_batch * self.global_batch
            yield from rest[:whole].reshape(-1, self.global_batch)
            rest = rest[whole:]
        if len(rest) and not self.drop_last:
            yield rest


class MixedTrainBatches(TrainBatches):
    """Batch sampler over several parts: each batch is from one part, the same on every rank.

    An epoch is one pass over every part. The parts alternate in random order.

    Args:
        sizes: part -> number of clips; indices run through the parts one after the other.
        batch_sizes: part -> clips per batch and rank.
        seed, rank, world_size, drop_last: see ``TrainBatches``.

    Raises:
        ValueError: a part is smaller than one global batch.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_sizes: Mapping[str, int],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ):
        super().__init__(sum(sizes.values()), 1, seed, rank, world_size, drop_last)
        for name, size in sizes.items():
            if drop_last and size < batch_sizes[name] * world_size:
                raise ValueError(
                    f"Part {name!r} of the training set has {size} clips, fewer than one batch of "
                    f"{batch_sizes[name] * world_size} ({batch_sizes[name]} on each of {world_size} ranks), and all "
                    "clips of a batch are from one part: lower data.batch_size (token_budget of buckets), add clips to "
                    "the part, remove it, or set data.drop_last=false."
                )
        self.sizes, self.batch_sizes = dict(sizes), dict(batch_sizes)
        self.parts = [
            TrainBatches(size, batch_sizes[name], seed, 0, world_size, drop_last) for name, size in sizes.items()
        ]
        self.counts = [len(part) for part in self.parts]  # batches of each part in an epoch

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def clips_per_batch(self) -> float:
        return float(np.average([part.clips_per_batch for part in self.parts], weights=self.counts))

    @property
    def order(self) -> dict[str, Any]:
        return {
            "clips": self.size,
            "seed": self.seed,
            "part_sizes": self.sizes,
            "batch_sizes": self.batch_sizes,
            "world_size": self.world_size,
            "drop_last": self.drop_last,
        }

    def global_batches(self, epoch: int) -> Iterator[np.ndarray]:
        starts = list(itertools.accumulate(self.sizes.values(), initial=0))
        batches = [self.part_batches(number, epoch) for number in range(len(self.parts))]
        turns = np.repeat(np.arange(len(batches)), self.counts)
        for number in np.random.default_rng([self.seed, epoch]).permutation(turns):
            yield starts[number] + next(batches[number])

    def part_batches(self, number: int, epoch: int) -> Iterator[np.ndarray]:
        """Global batches of one part, as indices into the part."""
        return self.parts[number].global_batches(epoch)


class WeightedTrainBatches(MixedTrainBatches):
    """Batch sampler over several parts, each with a given share of the batches.

    An epoch has as many batches as one pass over every part together; ``apportion`` divides them by the shares. A part
    with fewer batches than one pass shows the beginning of the pass, in a new order each epoch; a part with more is
    passed over again, in another order.

    Args:
        sizes: part -> number of clips.
        shares: part -> share of the batches; the shares add up to 1.
        batch_size: clips per batch and rank.
        seed, rank, world_size, drop_last: see ``TrainBatches``.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        shares: Mapping[str, float],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ):
        super().__init__(sizes, dict.fromkeys(sizes, batch_size), seed, rank, world_size, drop_last)
        self.global_batch = batch_size * world_size
        self.shares = dict(shares)
        self.counts = apportion(sum(self.counts), [shares[name] for name in sizes])

    @property
    def order(self) -> dict[str, Any]:
        own = {"part_sizes": self.sizes, "shares": self.shares, "drop_last": self.drop_last}
        return {"clips": self.size, "global_batch": self.global_batch, "seed": self.seed, **own}

    def part_batches(self, number: int, epoch: int) -> Iterator[np.ndarray]:
        # parts count from 1, because numpy seeds [s, e] and [s, e, 0, 0] alike
        seeds = ([self.seed, epoch, 1 + number, repeat] for repeat in itertools.count())
        return itertools.chain.from_iterable(map(self.parts[number].one_pass, seeds))


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Divides ``total`` by ``shares``, which add up to 1: the largest-remainder method, but at least 1 for each share,
    even if the sum exceeds ``total``."""
    ideal = total * np.asarray(shares)
    counts = np.floor(ideal).astype(int)
    largest_remainders = np.argsort(counts - ideal, kind="stable")
    counts[largest_remainders[: total - counts.sum()]] += 1
    return [max(1, int(count)) for count in counts]


class EvaluationBatches:
    """Batch sampler of one rank for validation and test: every clip once, in order, in batches of nearly equal size.

    Every rank has the same number of batches, each of at most ``batch_size`` clips.

    Raises:
        ValueError: there are fewer clips than ranks.
    """

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1):
        if size < world_size:
            raise ValueError(
                f"An evaluation set of {size} clips cannot be divided among {world_size} ranks: add clips."
            )
        self.size, self.rank, self.world_size = size, rank, world_size
        self.count = -(-size // (batch_size * world_size))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        for batch in np.array_split(np.arange(self.size), self.count):
            yield [int(i) for i in np.array_split(batch, self.world_size)[self.rank]]


class MixedEvaluationBatches:
    """Batch sampler for validation over several parts: every clip once. The parts alternate batch by batch, so that
    the first few batches show all parts.

    Args:
        sizes: part -> number of clips; indices run through the parts one after the other.
        batch_sizes: part -> largest batch of one rank.
        rank, world_size: see ``EvaluationBatches``.

    Raises:
        ValueError: a part has fewer clips than there are ranks.
    """

    def __init__(self, sizes: Mapping[str, int], batch_sizes: Mapping[str, int], rank: int = 0, world_size: int = 1):
        self.starts = list(itertools.accumulate(sizes.values(), initial=0))
        self.parts = [EvaluationBatches(size, batch_sizes[name], rank, world_size) for name, size in sizes.items()]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[list[int]]:
        for turn in itertools.zip_longest(*self.parts, fillvalue=()):
            yield from ([start + i for i in batch] for start, batch in zip(self.starts, turn) if batch)


class ByEpoch(Dataset):
    """Dataset indexed by (epoch, index). The epoch is part of the index because persistent workers are not notified of
    a new epoch."""

    def __init__(self, dataset: Clips):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: tuple[int, int]) -> dict:
        epoch, index = position
        return at_epoch(self.dataset, index, epoch)


def collate(clips: list[dict]) -> dict:
    """Collates clips with PyTorch's ``default_collate``.

    Raises:
        ValueError: videos or latents of different shapes; the message names two of them.
    """
    first = clips[0]
    key, axes = ("video", "(T, C, H, W)") if "video" in first else ("moments", "(2C, t, h, w)")
    for clip in clips[1:]:
        if clip[key].shape != first[key].shape:
            a, b = (f"{tuple(item[key].shape)} of {item.get('id', 'a clip')}" for item in (first, clip))
            raise ValueError(
                f"A batch contains {key} of different shapes {axes}: {a} and {b}. Make datasets of different shapes, "
                "such as images and clips, parts of a Mixture (data.train._target_: "
                "blueberry_video.data.mixture.Mixture), which draws each batch from one part; "
                "for files of different sizes set image_size and num_frames, or use VideoBuckets or LatentBuckets."
            )
    return default_collate(clips)
