"""Clips of several sizes in one training: each batch holds clips of one size, as many as fit a budget of tokens.

A bucket is a size (frames, height, width). What a step costs goes by its tokens, not by its clips, so a batch of a
bucket has ``token_budget`` // (tokens of its size) clips (as in Open-Sora, arXiv 2412.20404).
"""

import copy
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Subset

from blueberry_video.data.batches import EvaluationBatches, MixedEvaluationBatches, TrainBatches
from blueberry_video.data.clip_cache import Clips
from blueberry_video.data.latents import LatentClips
from blueberry_video.data.metadata import Row
from blueberry_video.data.mixture import Mixture
from blueberry_video.data.video_folder import VideoFolder
from blueberry_video.video.container import VideoInfo, probe
from blueberry_video.video.errors import VideoError


class Buckets(Mixture):
    """A mixture whose parts are buckets, all shown once an epoch, each with a batch size of its own.

    Args:
        parts: name -> map-style dataset of clips of one size.
        sizes: name -> (frames, height, width) of its clips: pixels, or latents where these are stored.
        tokens: name -> tokens of one clip.
        token_budget: most tokens of one rank's batch.

    Attributes:
        sizes: as given, of the buckets that have clips. Clip 0 is of the first: a text-to-video model shows samples in
            the size of the first bucket of the validation clips.
        token_budget: as given.
        batch_sizes: name -> clips of one rank's batch.

    Raises:
        ValueError: a bucket of which not one clip fits the budget; what ``Mixture`` raises.
    """

    def __init__(
        self,
        parts: Mapping[str, Clips],
        sizes: Mapping[str, tuple[int, int, int]],
        tokens: Mapping[str, int],
        token_budget: int,
    ):
        super().__init__(parts)
        self.token_budget = token_budget
        self.sizes = {name: sizes[name] for name in self.parts}
        for name in self.parts:
            if tokens[name] > token_budget:
                raise ValueError(
                    f"token_budget={token_budget} is below the {tokens[name]} tokens of one clip of the bucket {name}: "
                    f"raise it to {tokens[name]} or more, or remove the bucket."
                )
        self.batch_sizes = {name: token_budget // tokens[name] for name in self.parts}

    @property
    def cache_key(self) -> str:
        """Everything a clip depends on but its index; only where every bucket has a key."""
        return f"buckets-1/{json.dumps({name: part.cache_key for name, part in self.parts.items()})}"  # type: ignore[attr-defined]

    def describe(self) -> str:
        """Such as ``49x480x720: 120 clips, 2 a batch; 17x480x720: 31 clips, 5 a batch``, in the order of the clips."""
        return "; ".join(
            f"{name}: {size} clips, {self.batch_sizes[name]} a batch" for name, size in self.part_sizes.items()
        )


class VideoBuckets(Buckets):
    """The videos of a folder, each in the bucket that shows most of it.

    A video goes where it needs no enlarging and has enough frames; of these buckets to the one whose aspect ratio is
    nearest, and among equals to the one with most pixels.

    Args:
        dataset: a folder of videos; its own ``num_frames`` and ``image_size`` count for nothing.
        shapes: the buckets: (frames, height, width) each. Clips come in their order.
        token_size: pixels (frames, rows, columns) of one token: the stride of the codec times the patch of the
            network. The first frame of a codec stands alone: 1 + 4 k frames make 1 + k tokens at 4.
        token_budget: most tokens of one rank's batch.
        captions: refuse videos without a caption.
        leave_out_small: whether videos that fit no bucket are left out; else they are refused.

    Raises:
        ValueError: no or impossible shapes, a file without caption or without a bucket, each by name.
    """

    def __init__(
        self,
        dataset: VideoFolder,
        shapes: Sequence[Sequence[int]],
        token_size: Sequence[int],
        token_budget: int,
        captions: bool = True,
        leave_out_small: bool = False,
    ):
        if not shapes:
            raise ValueError(
                "shapes is empty: list at least one bucket, such as [49, 480, 720] (frames, height, width)."
            )
        wanted = {bucket_name(shape): shape for shape in (_three("shapes", shape) for shape in shapes)}
        token_size = _three("token_size", token_size)
        if dataset.sampler == "multi_clip":
            raise ValueError("sampler=multi_clip has no buckets: use uniform, random or fixed_fps.")
        if captions and (silent := [row.name for row in dataset.rows if not row.caption]):
            raise ValueError(
                f"{len(silent)} of {len(dataset.rows)} videos in {dataset.root} have no caption, such as "
                f"{silent[0]!r}: add captions to the metadata, or set captions=false for a model without text."
            )
        rows: dict[str, list[Row]] = {name: [] for name in wanted}
        for row in dataset.rows:
            try:
                info = probe(row.path)
            except VideoError as error:
                dataset.skip(row.name, str(error))
                continue
            shape = nearest_shape(_available(dataset, info), info.height, info.width, list(wanted.values()))
            if shape is not None:
                rows[bucket_name(shape)].append(row)
            elif not leave_out_small:
                raise ValueError(
                    f"the video {row.name!r} ({info.num_frames} frames of {info.height} x {info.width}) fits none of "
                    f"the buckets {', '.join(wanted)}: add a smaller one, or set "
                    "leave_out_small=true."
                )
        if not any(rows.values()):
            raise ValueError(
                f"none of the {len(dataset.rows)} videos in {dataset.root} fits one of the buckets "
                f"{', '.join(wanted)}: add smaller ones."
            )
        parts = {name: _cut(dataset, wanted[name], found) for name, found in rows.items() if found}
        tokens = {name: num_tokens(shape, token_size) for name, shape in wanted.items()}
        super().__init__(parts, wanted, tokens, token_budget)
        self._folders = [dataset, *parts.values()]

    @property
    def skipped_file(self) -> str | None:
        """Where files that are skipped are listed, also those that were found broken before it was named."""
        return self._folders[0].skipped_file

    @skipped_file.setter
    def skipped_file(self, path: str | None) -> None:
        for folder in self._folders:
            folder.skipped_file = path
        for name, reason in dict(self._folders[0].skipped).items():
            self._folders[0].skip(name, reason)

    def captions(self) -> Iterator[str]:
        """Of every clip, in order; reads no video."""
        return (row.caption or "" for folder in self._folders[1:] for row in folder.rows)


class LatentBuckets(Buckets):
    """Stored latents, a bucket for each size that they have.

    Buckets come in the order in which they begin in ``dataset``: of what was encoded from ``VideoBuckets``, in theirs.

    Args:
        dataset: what ``make latents`` wrote.
        patch_size: (t, h, w) latents that the network makes one token of.
        token_budget: most tokens of one rank's batch.

    Attributes:
        made_of, folder: of ``dataset``.

    Raises:
        ValueError: see ``Buckets``.
    """

    def __init__(self, dataset: LatentClips, patch_size: Sequence[int], token_budget: int):
        patch_size = _three("patch_size", patch_size)
        sizes: dict[str, tuple[int, int, int]] = {}
        places: dict[str, list[int]] = {}
        for index, (_, frames, height, width) in enumerate(dataset.shapes):
            shape = (frames, height, width)
            sizes[bucket_name(shape)] = shape
            places.setdefault(bucket_name(shape), []).append(index)
        parts = {name: Subset(dataset, found) for name, found in places.items()}
        tokens = {
            name: math.prod(math.ceil(size / patch) for size, patch in zip(shape, patch_size))
            for name, shape in sizes.items()
        }
        super().__init__(parts, sizes, tokens, token_budget)
        self.classes, self.reversal_pairs = dataset.classes, dataset.reversal_pairs
        self.made_of, self.folder = dataset.made_of, dataset.folder
        self._clips = dataset

    def captions(self) -> Iterator[str]:
        """Of every clip, in the order of ``dataset``; reads no latents."""
        return self._clips.captions()


class BucketTrainBatches(TrainBatches):
    """Batches of buckets, each of one bucket, the same one on every rank; every clip at most once an epoch.

    Args:
        sizes: name -> clips of each bucket; indices count through the buckets one after the other.
        batch_sizes: clips of one rank's batch, in the same order.
        seed: with the epoch determines the order, of the clips and of the buckets.
        rank, world_size, drop_last: as for ``TrainBatches``.

    Raises:
        ValueError: a bucket does not make one batch.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_sizes: Sequence[int],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ):
        super().__init__(sum(sizes.values()), 1, seed, rank, world_size, drop_last)
        for (name, size), batch_size in zip(sizes.items(), batch_sizes):
            if drop_last and size < batch_size * world_size:
                raise ValueError(
                    f"The bucket {name} has {size} clips, fewer than one batch of {batch_size * world_size} "
                    f"({batch_size} fit the token budget, on {world_size} ranks): lower token_budget, remove the "
                    "bucket so that its clips go to another, or set data.drop_last=false."
                )
        self.walks = [
            TrainBatches(size, batch_size, seed, 0, world_size, drop_last)
            for size, batch_size in zip(sizes.values(), batch_sizes)
        ]
        self.starts = [0, *itertools.accumulate(sizes.values())][:-1]

    def __len__(self) -> int:
        return sum(map(len, self.walks))

    def global_batches(self, epoch: int) -> Iterator[np.ndarray]:
        walks = [walk.global_batches(epoch) for walk in self.walks]
        turns = np.repeat(np.arange(len(walks)), [len(walk) for walk in self.walks])
        for bucket in np.random.default_rng([self.seed, epoch]).permutation(turns):
            yield self.starts[bucket] + next(walks[bucket])


class BucketEvaluationBatches(MixedEvaluationBatches):
    """Every clip of every bucket once, in batches of at most ``batch_sizes`` clips; the buckets take turns.

    Args:
        sizes, batch_sizes: clips, and clips of one rank's batch, of each bucket.
        rank, world_size: as for ``EvaluationBatches``.
    """

    def __init__(self, sizes: Sequence[int], batch_sizes: Sequence[int], rank: int = 0, world_size: int = 1):
        self.starts = [0, *itertools.accumulate(sizes)][:-1]
        self.parts = [EvaluationBatches(size, batch, rank, world_size) for size, batch in zip(sizes, batch_sizes)]


def nearest_shape(
    num_frames: float, height: int, width: int, shapes: Sequence[tuple[int, int, int]]
) -> tuple[int, int, int] | None:
    """The bucket (frames, height, width) of a video, by the rule of :class:`VideoBuckets`; None where it fits none."""
    fitting = [(t, h, w) for t, h, w in shapes if t <= num_frames and h <= height and w <= width]
    if not fitting:
        return None
    distances = {shape: round(abs(math.log(shape[2] / shape[1] * height / width)), 6) for shape in fitting}
    return min(fitting, key=lambda shape: (distances[shape], -math.prod(shape)))


def num_tokens(shape: Sequence[int], token_size: Sequence[int]) -> int:
    """Tokens of a clip (frames, height, width) in pixels; a codec's first frame stands alone."""
    (frames, *picture), (time, *patch) = shape, token_size
    return (math.ceil((frames - 1) / time) + 1) * math.prod(
        math.ceil(size / step) for size, step in zip(picture, patch)
    )


def bucket_name(shape: Sequence[int]) -> str:
    """Such as ``49x480x720``."""
    return "x".join(map(str, shape))


def reading(
    folder: Path, encoded: Mapping[str, Clips], patch_size: Sequence[int], batch_sizes: Mapping[str, int]
) -> list[str]:
    """The overrides with which a config reads the latents in ``folder``/{train,val}: its ``data`` is ``latents``, or
    ``latent_buckets`` where their sizes differ.

    Args:
        encoded: split -> what the latents were made of; buckets keep their budgets.
        patch_size: (t, h, w) latents that the network makes one token of.
        batch_sizes: key of ``data`` -> its value, which count where there are no buckets.
    """
    stored = {split: LatentClips(folder / split) for split in encoded}
    if all(len(set(clips.shapes)) == 1 for clips in stored.values()):
        folders = {f"{split}.folder": clips.folder for split, clips in stored.items()}
        return ["data=latents", *(f"data.{key}={value}" for key, value in {**folders, **batch_sizes}.items())]
    found = ["data=latent_buckets", f"data.train.patch_size=[{','.join(map(str, patch_size))}]"]
    for split, clips in stored.items():
        found.append(f"data.{split}.dataset.folder={clips.folder}")
        if isinstance(dataset := encoded[split], Buckets):
            found.append(f"data.{split}.token_budget={dataset.token_budget}")
    return found


def _three(key: str, values: Sequence[int]) -> tuple[int, int, int]:
    if len(values) != 3 or min(values) < 1:
        raise ValueError(
            f"{key} has {list(values)}, which is no (frames, height, width): write three numbers of at least 1, such "
            "as [49, 480, 720] for clips and [4, 16, 16] or [1, 2, 2] for tokens."
        )
    frames, height, width = map(int, values)
    return frames, height, width


def _available(dataset: VideoFolder, info: VideoInfo) -> float:
    """How many frames a clip of this video may have, as the dataset samples them."""
    if dataset.pad:
        return math.inf
    if dataset.sampler == "random":
        return (info.num_frames - 1) // dataset.stride + 1
    if dataset.sampler == "fixed_fps":
        assert dataset.fps is not None
        return int((info.timestamps[-1] - info.timestamps[0]) * dataset.fps) + 1
    return info.num_frames


def _cut(dataset: VideoFolder, shape: tuple[int, int, int], rows: list[Row]) -> VideoFolder:
    """The same folder, with these files alone, cut to this size."""
    part = copy.copy(dataset)
    part.num_frames, part.image_size, part.rows = shape[0], shape[1:], rows
    return part
