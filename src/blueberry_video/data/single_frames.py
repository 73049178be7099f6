"""Single frames of clips as an image dataset."""

from typing import Literal

import numpy as np

from blueberry_video.data.clips import Clips, Wrapper, at_epoch


class SingleFrames(Wrapper):
    """Map-style dataset of one frame per clip: ``video`` uint8 (1, 3, H, W), ``id`` (``<id of the clip>@<frame>``) and,
    if the clip has them, ``caption``, ``labels``, and ``depth`` or ``disparity`` (1, H, W).

    Labels with reversal pairs are dropped: they name a motion, which a single frame does not show.

    Args:
        dataset: map-style dataset of clips.
        frame: an index from 0, ``"middle"`` (T // 2), or ``"random"``: a pure function of (seed, epoch, index), which
            differs between training epochs and is the same in every validation.
        seed: seed of the ``random`` frames.

    Raises:
        ValueError: an unknown ``frame``; when reading: a clip with too few frames.
    """

    def __init__(self, dataset: Clips, frame: int | Literal["random", "middle"] = "random", seed: int = 0):
        if frame not in ("random", "middle") and not (isinstance(frame, int) and frame >= 0):
            raise ValueError(f"frame={frame!r} must be an index of at least 0, 'middle' or 'random'.")
        self.dataset, self.sources, self.frame, self.seed = dataset, [dataset], frame, seed
        motions = getattr(dataset, "reversal_pairs", {})
        known: dict[str, tuple[str, ...]] = getattr(dataset, "classes", {})
        self.classes = {label: names for label, names in known.items() if label not in motions}
        self.reversal_pairs: dict[str, tuple[tuple[int, int], ...]] = {}
        self._motions = frozenset(motions)
        self.varies_by_epoch = frame == "random" or getattr(dataset, "varies_by_epoch", False)

    @property
    def cache_key(self) -> str:
        """Everything that an item depends on except its index and the epoch; requires that the clips have a key."""
        return f"single-frames-2/{self.frame}/{self.seed}/{self.dataset.cache_key}"  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return self.sample(index, epoch=0)

    def sample(self, index: int, epoch: int) -> dict:
        """Item ``index`` in epoch ``epoch``."""
        clip = at_epoch(self.dataset, index, epoch)
        number = self._number(len(clip["video"]), index, epoch)
        if number >= len(clip["video"]):
            raise ValueError(
                f"frame={number} is outside {clip['id']!r}, which has {len(clip['video'])} frames: choose a lower "
                "index, or 'middle'."
            )
        item = {"video": clip["video"][number : number + 1].clone(), "id": f"{clip['id']}@{number}"}
        for key in ("depth", "disparity"):
            if key in clip:
                item[key] = clip[key][number : number + 1].clone()
        if "caption" in clip:
            item["caption"] = clip["caption"]
        labels = {label: value for label, value in clip.get("labels", {}).items() if label not in self._motions}
        return {**item, "labels": labels} if labels else item

    def _number(self, frames: int, index: int, epoch: int) -> int:
        if self.frame == "random":
            return int(np.random.default_rng([self.seed, epoch, index]).integers(frames))
        return frames // 2 if self.frame == "middle" else int(self.frame)
