"""Datasets of clips of several sizes: each batch contains clips of one size, as many as fit a budget of tokens.

A bucket is a size (frames, height, width). The cost of a step depends on its number of tokens rather than of clips, so
the batch size of a bucket is ``token_budget`` // (tokens per clip), as in Open-Sora (arXiv 2412.20404).
"""

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch.utils.data import Subset

from blueberry_video.data.batches import MixedEvaluationBatches, MixedTrainBatches
from blueberry_video.data.clips import Clips
from blueberry_video.data.latents import LatentClips
from blueberry_video.data.media_folder import broken_reason
from blueberry_video.data.metadata import Row
from blueberry_video.data.mixture import Mixture
from blueberry_video.data.video_folder import VideoClips
from blueberry_video.video.container import VideoInfo
from blueberry_video.video.errors import VideoError
from blueberry_video.video.resize import display_size


class Buckets(Mixture):
    """Mixture of buckets. Every clip appears once an epoch, and every bucket has its batch size.

    Args:
        parts: name -> map-style dataset of clips of one size.
        sizes: name -> (frames, height, width) of the clips, in pixels, or in latents if these are stored.
        tokens: name -> tokens per clip.
        token_budget: maximum number of tokens in a batch of one rank.

    Attributes:
        sizes: as passed, for the buckets that have clips. Clip 0 is in the first bucket: a text-to-video model samples
            at the size of the first bucket of the validation clips.
        token_budget: as passed.
        batch_sizes: name -> clips per batch and rank.

    Raises:
        ValueError: a clip of some bucket exceeds the budget; errors of ``Mixture``.
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
                    f"token_budget={token_budget} must be at least {tokens[name]}, the tokens of one clip of the "
                    f"bucket {name}: raise it, or remove the bucket."
                )
        self.batch_sizes = {name: token_budget // tokens[name] for name in self.parts}

    @property
    def cache_key(self) -> str:
        """Everything that a clip depends on except its index; requires that every bucket has a key."""
        return f"buckets-1/{json.dumps({name: part.cache_key for name, part in self.parts.items()})}"  # type: ignore[attr-defined]

    def describe(self) -> str:
        """Returns a line like ``49x480x720: 120 clips in batches of 2; 17x480x720: 31 clips in batches of 5``."""
        return "; ".join(
            f"{name}: {size} clips in batches of {self.batch_sizes[name]}" for name, size in self.part_sizes.items()
        )

    def train_batches(
        self, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, drop_last: bool = True
    ) -> MixedTrainBatches:
        """Batch sampler for training: one pass over every bucket per epoch; ignores ``batch_size``."""
        return MixedTrainBatches(self.part_sizes, self.batch_sizes, seed, rank, world_size, drop_last)

    def evaluation_batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> MixedEvaluationBatches:
        """Batch sampler for validation, the buckets alternating; ignores ``batch_size``."""
        return MixedEvaluationBatches(self.part_sizes, self.batch_sizes, rank, world_size)


class VideoBuckets(Buckets):
    """Videos of a folder, each in the bucket that shows most of it.

    Of the buckets for which a video has enough frames and needs no upscaling, the one with the nearest aspect ratio is
    chosen; of equal ones, the one with the most pixels.

    Args:
        dataset: folder of videos; its ``num_frames`` and ``image_size`` are ignored.
        shapes: (frames, height, width) of each bucket, in the order of the clips.
        token_size: pixels (frames, rows, columns) per token: the stride of the autoencoder times the patch size of the
            network. The first frame is encoded separately: 1 + 4 k frames make 1 + k tokens at a stride of 4.
        token_budget: maximum number of tokens in a batch of one rank.
        captions: raise for videos without a caption.
        leave_out_small: drop videos that fit no bucket; otherwise they raise.

    Raises:
        ValueError: no shapes or invalid ones; a file without a caption or a bucket. The message names it.
    """

    def __init__(
        self,
        dataset: VideoClips,
        shapes: Sequence[Sequence[int]],
        token_size: Sequence[int],
        token_budget: int,
        captions: bool = True,
        leave_out_small: bool = False,
    ):
        if not shapes:
            raise ValueError("shapes is empty: list at least one bucket (frames, height, width), as in [49, 480, 720].")
        wanted = {bucket_name(shape): shape for shape in (_three("shapes", shape) for shape in shapes)}
        token_size = _three("token_size", token_size)
        if dataset.sampler in ("multi_clip", "segments"):
            raise ValueError(
                f"sampler={dataset.sampler} cannot be used with buckets: use uniform, random or fixed_fps."
            )
        if captions and (missing := [row.name for row in dataset.rows if not row.caption]):
            raise ValueError(
                f"{len(missing)} of {len(dataset.rows)} videos in {dataset.location} have no caption, the first "
                f"of them {missing[0]!r}: add captions to the metadata, or set captions=false for a model without text."
            )
        rows: dict[str, list[Row]] = {name: [] for name in wanted}
        for row in dataset.rows:
            try:
                info = dataset.probe(row)
                size = (info.height, info.width)
                if dataset.square_pixels:
                    size = display_size(*size, info.picture.pixel_aspect)
            except (VideoError, OSError) as error:
                dataset.skip(row.name, broken_reason(error))
                continue
            shape = nearest_shape(_available(dataset, info), *size, list(wanted.values()))
            if shape is not None:
                rows[bucket_name(shape)].append(row)
            elif not leave_out_small:
                raise ValueError(
                    f"the video {row.name!r} ({info.num_frames} frames of {info.height} x {info.width}) is too small "
                    f"for every bucket of shapes ({', '.join(wanted)}): add a smaller one, or set leave_out_small=true."
                )
        if not any(rows.values()):
            raise ValueError(
                f"all {len(dataset.rows)} videos in {dataset.location} are too small for every bucket of shapes "
                f"({', '.join(wanted)}): add smaller ones."
            )
        parts = {name: _restricted(dataset, wanted[name], found) for name, found in rows.items() if found}
        tokens = {name: num_tokens(shape, token_size) for name, shape in wanted.items()}
        super().__init__(parts, wanted, tokens, token_budget)
        self._folders = list(parts.values())
        self.sources = [dataset, *self._folders]

    def captions(self) -> Iterator[str]:
        """Yields the caption of every clip, in order, without reading videos."""
        return (row.caption or "" for folder in self._folders for row in folder.rows)


class LatentBuckets(Buckets):
    """Stored latents, with a bucket for each size that occurs.

    The buckets are in order of first occurrence in ``dataset``; for latents of ``VideoBuckets`` this is the order of
    the latter.

    Args:
        dataset: the output of ``make latents``.
        patch_size: (t, h, w) latents per token of the network.
        token_budget: maximum number of tokens in a batch of one rank.

    Attributes:
        made_of, folder: those of ``dataset``.

    Raises:
        ValueError: see ``Buckets``.
    """

    def __init__(self, dataset: LatentClips, patch_size: Sequence[int], token_budget: int):
        patch_size = _three("patch_size", patch_size)
        sizes: dict[str, tuple[int, int, int]] = {}
        indices: dict[str, list[int]] = {}
        for index, (_, frames, height, width) in enumerate(dataset.shapes):
            shape = (frames, height, width)
            sizes[bucket_name(shape)] = shape
            indices.setdefault(bucket_name(shape), []).append(index)
        parts = {name: Subset(dataset, found) for name, found in indices.items()}
        tokens = {
            name: math.prod(math.ceil(size / patch) for size, patch in zip(shape, patch_size))
            for name, shape in sizes.items()
        }
        super().__init__(parts, sizes, tokens, token_budget)
        self.classes, self.reversal_pairs = dataset.classes, dataset.reversal_pairs
        self.made_of, self.folder = dataset.made_of, dataset.folder
        self._clips = dataset

    def captions(self) -> Iterator[str]:
        """Yields the caption of every clip, in the order of ``dataset``, without reading latents."""
        return self._clips.captions()


def nearest_shape(
    num_frames: float, height: int, width: int, shapes: Sequence[tuple[int, int, int]]
) -> tuple[int, int, int] | None:
    """Returns the bucket (frames, height, width) of a video by the rule of :class:`VideoBuckets`; None if none fits."""
    fitting = [(t, h, w) for t, h, w in shapes if t <= num_frames and h <= height and w <= width]
    if not fitting:
        return None
    distances = {shape: round(abs(math.log(shape[2] / shape[1] * height / width)), 6) for shape in fitting}
    return min(fitting, key=lambda shape: (distances[shape], -math.prod(shape)))


def num_tokens(shape: Sequence[int], token_size: Sequence[int]) -> int:
    """Returns the number of tokens of a clip (frames, height, width) in pixels; an autoencoder encodes the first frame
    separately."""
    (frames, *picture), (time, *patch) = shape, token_size
    return (math.ceil((frames - 1) / time) + 1) * math.prod(
        math.ceil(size / step) for size, step in zip(picture, patch)
    )


def bucket_name(shape: Sequence[int]) -> str:
    """Returns the name of a bucket, as in ``49x480x720``."""
    return "x".join(map(str, shape))


def reading(
    folder: Path, encoded: Mapping[str, Clips], patch_size: Sequence[int], batch_sizes: Mapping[str, int]
) -> list[str]:
    """Returns the config overrides that read the latents in ``folder``/{train,val}: ``data=latents``, or
    ``data=latent_buckets`` if their sizes differ.

    Args:
        encoded: split -> dataset from which the latents were computed; buckets keep their token budgets.
        patch_size: (t, h, w) latents per token of the network.
        batch_sizes: key of ``data`` -> value, used without buckets.
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
            f"{key}: {list(values)} must be (frames, height, width), three numbers of at least 1: write [49, 480, 720] "
            "for clips, or [4, 16, 16] or [1, 2, 2] for tokens."
        )
    frames, height, width = map(int, values)
    return frames, height, width


def _available(dataset: VideoClips, info: VideoInfo) -> float:
    """Returns the maximum number of frames in a clip of this video, with the sampling of the dataset."""
    if dataset.pad:
        return math.inf
    if dataset.sampler == "random":
        return (info.num_frames - 1) // dataset.stride + 1
    if dataset.sampler == "fixed_fps":
        assert dataset.fps is not None
        return int((info.timestamps[-1] - info.timestamps[0]) * dataset.fps) + 1
    return info.num_frames


def _restricted(dataset: VideoClips, shape: tuple[int, int, int], rows: list[Row]) -> VideoClips:
    """Returns the same folder with only these files, resized to this shape."""
    part = copy.copy(dataset)
    part.num_frames, part.image_size, part.rows, part.counted = shape[0], shape[1:], rows, dataset.rows
    return part
