"""Single frames of clips as an image dataset: images from every source of videos."""

from typing import Literal

import numpy as np
from torch.utils.data import Dataset

from blueberry_video.data.batches import at_epoch
from blueberry_video.data.clip_cache import Clips


class SingleFrames(Dataset):
    """Map-style dataset of one frame of every clip: ``video`` uint8 (1, 3, H, W), ``id`` (the clip's, ``@`` and the
    number of the frame) and, where the clip has them, ``caption`` and ``labels``.

    Labels with reversal pairs are left out: they name a motion, and one frame does not show it.

    Args:
        dataset: map-style dataset of clips.
        frame: a number from 0, ``"middle"`` (T // 2), or ``"random"``: a pure function of (seed, epoch, index), so
            another one in each epoch of training, and the same one in every validation.
        seed: of the ``random`` frames.

    Raises:
        ValueError: another ``frame``; when reading: a clip without it.
    """

    def __init__(self, dataset: Clips, frame: int | Literal["random", "middle"] = "random", seed: int = 0):
        if frame not in ("random", "middle") and not (isinstance(frame, int) and frame >= 0):
            raise ValueError(f"frame={frame!r} is no frame: write a number from 0, 'middle' or 'random'.")
        self.dataset, self.frame, self.seed = dataset, frame, seed
        motions = getattr(dataset, "reversal_pairs", {})
        known: dict[str, tuple[str, ...]] = getattr(dataset, "classes", {})
        self.classes = {label: names for label, names in known.items() if label not in motions}
        self.reversal_pairs: dict[str, tuple[tuple[int, int], ...]] = {}
        self._motions = frozenset(motions)
        self.varies_by_epoch = frame == "random" or getattr(dataset, "varies_by_epoch", False)

    @property
    def cache_key(self) -> str:
        """Everything an item depends on but its index and the epoch; only where the dataset of clips has a key."""
        return f"single-frames-1/{self.frame}/{self.seed}/{self.dataset.cache_key}"  # type: ignore[attr-defined]

    @property
    def skipped_file(self) -> str | None:
        """Where the dataset of clips lists files that it skips."""
        return getattr(self.dataset, "skipped_file", None)

    @skipped_file.setter
    def skipped_file(self, path: str | None) -> None:
        if hasattr(self.dataset, "skipped_file"):
            self.dataset.skipped_file = path

    def prepare(self, num_workers: int = 0) -> None:
        """Fills the clip cache, if the clips come from one."""
        if hasattr(self.dataset, "prepare"):
            self.dataset.prepare(num_workers=num_workers)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return self.sample(index, epoch=0)

    def sample(self, index: int, epoch: int) -> dict:
        """Item ``index`` as epoch ``epoch`` shows it."""
        clip = at_epoch(self.dataset, index, epoch)
        number = self._number(len(clip["video"]), index, epoch)
        if number >= len(clip["video"]):
            raise ValueError(
                f"frame={number} of {clip['id']!r}, which has {len(clip['video'])} frames: choose a lower one, or "
                "'middle'."
            )
        item = {"video": clip["video"][number : number + 1].clone(), "id": f"{clip['id']}@{number}"}
        if "caption" in clip:
            item["caption"] = clip["caption"]
        labels = {label: value for label, value in clip.get("labels", {}).items() if label not in self._motions}
        return {**item, "labels": labels} if labels else item

    def _number(self, frames: int, index: int, epoch: int) -> int:
        if self.frame == "random":
            return int(np.random.default_rng([self.seed, epoch, index]).integers(frames))
        return frames // 2 if self.frame == "middle" else int(self.frame)
