"""Statistics and seeds of validation that depend on neither batches nor processes."""

import zlib
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils.data import default_collate

MAX_CLIPS = 32


def clip_seeds(batch: dict) -> list[int]:
    """Returns a seed for every clip: the CRC-32 of its ``id``, or its row in a batch without ids."""
    if "id" not in batch:
        return list(range(len(batch["video"])))
    return [zlib.crc32(str(name).encode()) for name in batch["id"]]


def seeded_generators(batch: dict) -> list[torch.Generator]:
    """Returns a CPU generator for every clip, seeded with :func:`clip_seeds`."""
    return [torch.Generator().manual_seed(seed) for seed in clip_seeds(batch)]


class ReferenceClips:
    """Up to 32 evenly spaced clips of a validation or test set, from which baselines take their means.

    Means over a batch depend on its size, and are the clip itself in a batch of one. The clips are the same on every
    process, and are held in memory.
    """

    def __init__(self) -> None:
        self._clips: dict[str, list[dict]] = {}  # by stage
        self._means: dict[str, dict[torch.Size, Tensor]] = {}  # by stage and shape

    @torch.no_grad()
    def measure(self, task: Any, stage: str, embed: Callable[[dict], Tensor]) -> dict[torch.Size, Tensor]:
        """Returns ``embed(batch)`` of all clips, K of each shape: shape -> (K, *shape).

        Args:
            task: LightningModule in a trainer with a datamodule; without one there are no clips.
            stage: ``"val"`` or ``"test"``.
            embed: maps a batch of one, as ``task.shared_step`` receives it, to a tensor (1, …).
        """
        found: dict[torch.Size, list[Tensor]] = {}
        for clip in self._load(task, stage):
            batch = task.trainer.precision_plugin.convert_input(move_data_to_device(clip, task.device))
            embedded = embed(task.on_after_batch_transfer(batch, 0))
            found.setdefault(embedded.shape[1:], []).append(embedded)
        return {shape: torch.cat(parts) for shape, parts in found.items()}

    def mean(self, task: Any, stage: str, like: Tensor, embed: Callable[[dict], Tensor]) -> Tensor:
        """Returns the mean of :meth:`measure` for the shape of ``like[0]``; zeros if fewer than two clips have it.

        Computed once, for embeddings that do not change in training.
        """
        if stage not in self._means:
            found = self.measure(task, stage, embed)
            if not found:  # no trainer
                return torch.zeros_like(like[0])
            self._means[stage] = {shape: clips.mean(dim=0) for shape, clips in found.items() if len(clips) > 1}
        return self._means[stage].get(like.shape[1:], torch.zeros_like(like[0])).to(like)

    def _load(self, task: Any, stage: str) -> list[dict]:
        dataset = None if task._trainer is None else getattr(getattr(task.trainer, "datamodule", None), stage, None)
        if dataset is None:
            return []
        if stage not in self._clips:
            size = len(dataset)
            count = min(size, MAX_CLIPS)
            self._clips[stage] = [default_collate([dataset[i * size // count]]) for i in range(count)]
        return self._clips[stage]
