"""Pseudo-labels of depth on disk: the disparity that a teacher predicts for the clips of a dataset.

The files are those of ``latents.LatentShards`` with the tensor ``disparity`` instead of latents. After a kill, the same
call writes the missing shards, and the files are identical byte for byte.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from blueberry_video.data.clip_cache import check_storable
from blueberry_video.data.clips import KeyedClips, Wrapper, check_index
from blueberry_video.data.latents import LatentClips, LatentShards
from blueberry_video.data.progress import Progress
from blueberry_video.installation import start_command

COMMAND = start_command("pseudo-labels", "…")


class _DisparityShards(LatentShards):
    key: ClassVar[str] = "disparity"
    command: ClassVar[str] = COMMAND


class _DisparityClips(LatentClips):
    command: ClassVar[str] = COMMAND


class PseudoLabelWriter:
    """Writer of the pseudo-labels of a dataset.

    Args:
        shard_size: clips per file.
        dtype: ``float32``, or ``float16`` for half the bytes and 3 significant digits.
        num_workers: number of processes that read clips.

    Raises:
        ValueError: an unknown ``dtype``, or a size out of range.
    """

    def __init__(self, shard_size: int = 64, dtype: Literal["float32", "float16"] = "float32", num_workers: int = 0):
        if dtype not in ("float32", "float16"):
            raise ValueError(f"dtype={dtype!r} must be 'float32' or 'float16'.")
        if shard_size < 1 or num_workers < 0:
            raise ValueError(f"shard_size={shard_size} must be at least 1, and num_workers={num_workers} at least 0.")
        self.shard_size, self.dtype, self.num_workers = shard_size, dtype, num_workers

    def __call__(
        self, dataset: KeyedClips, predict: Callable[[Tensor], Tensor], folder: str | Path, teacher: str
    ) -> "PseudoLabelled":
        """Writes the shards that ``folder`` lacks, clip by clip.

        Args:
            dataset: clips; must have a ``cache_key``, and be the same in every epoch.
            predict: video uint8 (T, 3, H, W) -> disparity (T, H, W), larger for nearer pixels.
            folder: folder of this dataset and teacher only.
            teacher: identifies the weights of ``predict``.

        Returns:
            The dataset with its pseudo-labels.

        Raises:
            ValueError: the dataset cannot be stored, the folder was written with other settings, or a map has a wrong
                shape or is not finite.
        """
        check_storable(dataset)
        made_of = {"teacher": teacher, "data": dataset.cache_key, "dtype": self.dtype}
        with _DisparityShards(folder, made_of, len(dataset), self.shard_size) as shards:
            wanted = [index for number in shards.missing for index in shards.indices(number)]
            rows: Subset = Subset(cast(Dataset, dataset), wanted)
            own = torch.Generator()  # the global one must not depend on the number of missing shards
            clips = iter(DataLoader(rows, batch_size=None, num_workers=self.num_workers, generator=own))
            progress = Progress(str(folder), len(wanted)) if wanted else None
            for number in shards.missing:
                shards.write(number, [self._labelled(next(clips), predict, progress) for _ in shards.indices(number)])
        return PseudoLabelled(dataset, folder)

    def _labelled(self, clip: dict, predict: Callable[[Tensor], Tensor], progress: Progress | None) -> dict:
        maps, expected = predict(clip["video"]).to(getattr(torch, self.dtype)), tuple(clip["video"][:, 0].shape)
        if tuple(maps.shape) != expected:
            raise ValueError(f"the maps of {clip['id']!r} have shape {tuple(maps.shape)}, but must be {expected}.")
        if progress is not None:
            progress.add(1)
        return {"id": clip["id"], "disparity": maps}


class PseudoLabelled(Wrapper):
    """Map-style dataset of clips with the ``disparity`` float32 (T, H, W) of a teacher, without their ``depth``.

    Args:
        dataset: the labelled clips.
        folder: written for them by :class:`PseudoLabelWriter`, as ``make pseudo_labels`` does.

    Attributes:
        made_of: what the labels depend on, by name.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder is incomplete or belongs to other clips; when reading: a shard is damaged, or of a
            different clip.
    """

    def __init__(self, dataset: KeyedClips, folder: str | Path):
        check_storable(dataset)
        self.dataset, self.sources = dataset, [dataset]
        self.labels = _DisparityClips(folder)
        self.made_of = self.labels.made_of
        for key, now in (("data", dataset.cache_key), ("size", len(dataset))):
            if self.made_of.get(key) != now:
                raise ValueError(
                    f"{folder} has pseudo-labels of {key}={self.made_of.get(key)!r}, but the dataset has {key}={now!r}"
                    f": use the dataset that was labelled, or run `{COMMAND}` for this one with another OUT."
                )
        self.classes: dict[str, tuple[str, ...]] = getattr(dataset, "classes", {})
        self.reversal_pairs: dict[str, tuple[tuple[int, int], ...]] = getattr(dataset, "reversal_pairs", {})

    @property
    def cache_key(self) -> str:
        """Everything that a clip depends on except its index."""
        digest = hashlib.sha256(json.dumps(self.made_of, sort_keys=True).encode()).hexdigest()
        return f"pseudo-labelled-1/{digest}"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        check_index(index, len(self))
        clip, label = self.dataset[index], self.labels[index]
        if clip["id"] != label["id"]:
            raise ValueError(
                f"clip {index} is {clip['id']!r}, but its pseudo-label is that of {label['id']!r}: files have changed "
                f"or vanished. Run `{COMMAND}` again with another OUT."
            )
        rest = {key: value for key, value in clip.items() if key not in ("depth", "disparity")}
        return {**rest, "disparity": label["disparity"].float()}
