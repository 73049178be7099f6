"""Evaluation of the memory of a video generator: an object must be the same after the camera leaves it and returns."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from blueberry_video.evaluation.end_of_run import evaluate_at_end
from blueberry_video.evaluation.memory_metrics import CHANCE, NONE, Objects, accuracies, mask_overlap, read_objects


class Clips(Protocol):
    """Clips such as those of :class:`blueberry_video.data.memory_world.MemoryWorld`, with the same number of unseen
    frames in each."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict: ...


class TokenRollout(Protocol):
    """Continuation of token videos, such as :class:`blueberry_video.inference.rollout.Rollout`."""

    def __call__(
        self, model: Any, prompt_ids: Tensor, actions: Tensor, reset_at: int | None, generator: Sequence[int]
    ) -> Tensor: ...


class Away(NamedTuple):
    """Frames without the object: ``first`` to ``last`` of the pixels, and the frames of tokens that follow from them.

    Attributes:
        first, last: frames of pixels.
        seen: number of frames of tokens before the first that contains one of them.
        reset: the middle one of the frames of tokens that contain only them.
        back: first frame of tokens after these.
    """

    first: int
    last: int
    seen: int
    reset: int
    back: int

    @classmethod
    def of(cls, visible: Tensor, stride: int) -> "Away":
        """Frames of clips with ``visible`` (T,), at the temporal stride of the tokenizer: frame j > 0 of the tokens
        contains frames 1 + (j - 1) stride to j stride of the pixels.

        Raises:
            ValueError: if no frame of tokens contains only unseen frames, the first frame is unseen, or fewer than two
                frames follow.
        """
        hidden = (~visible).nonzero()[:, 0].tolist()
        if not hidden or not visible[0] or hidden[-1] + 2 >= len(visible) or len(hidden) <= hidden[-1] - hidden[0]:
            raise ValueError(
                f"callbacks.recall.clips: the visible frames {visible.int().tolist()} must begin with 1, have one run "
                "of 0, and end with 1, 1 or more."
            )
        first, last = hidden[0], hidden[-1]
        start, back = 1 + -((1 - first) // stride), last // stride + 1
        if start >= back:
            raise ValueError(
                f"callbacks.recall.clips: the unseen frames {first} to {last} contain no whole frame of tokens at the "
                f"temporal stride {stride}: use unseen={2 * stride} or more."
            )
        return cls(first, last, 1 + (first - 1) // stride, start + (back - start) // 2, back)


class Recall(Callback):
    """Generates what the camera sees while and after it is away from an object, at the end of training.

    The model receives the tokens of the first frames and the actions of the camera, and generates the rest. A rule
    reads the object in the frames of the initial view at the end
    (:func:`~blueberry_video.evaluation.memory_metrics.read_objects`). For clips with N unseen frames, it logs:

    - ``<name>/colour_N``, ``<name>/size_N``, ``<name>/shape_N``: shares of clips with the right class;
      ``<name>/overlap_N``: mean intersection over union of the mask of the object with that of the real frames;
      ``<name>/found_N``: share of clips in which there is an object;
    - the same with ``_reset``: the states of the model are reset in the middle of the unseen frames;
    - the same but ``found`` with ``_trivial``: chance level; of the overlap, the value of the real frames of another
      clip;
    - ``<name>/colour_N_gain``: the difference of ``colour_N`` and the larger of ``_reset`` and ``_trivial``;
    - the same with ``_coded``: real frames after the tokenizer, an upper limit;
    - the same without the overlap with ``_real``: real frames, the accuracy of the rule.

    The tokenizer must be causal; its decoder receives all frames of a clip. If it remembers the object itself, the
    values of ``_reset`` are above chance.
    Labels and text are not used.

    Args:
        clips: datasets with different N.
        rollout: generates tokens.
        name: prefix of the metrics.
        count: clips of each dataset, its first ones.
        batch_size: clips generated together.
        prompt: ``"seen"``: the frames before the object leaves; ``"away"``: also the real unseen frames, so that only
            the return is generated.
        seed: seed of the first clip; that of clip i is ``seed`` + i, with and without the reset.

    Raises:
        ValueError: for numbers below 1, an unknown prompt and, at the end of training, for fewer clips than ``count``,
            clips that differ in their unseen frames, or two datasets with the same N.
    """

    def __init__(
        self,
        clips: Sequence[Clips],
        rollout: TokenRollout,
        name: str = "recall",
        count: int = 60,
        batch_size: int = 30,
        prompt: Literal["seen", "away"] = "seen",
        seed: int = 0,
    ):
        for key, number in (("count", count), ("batch_size", batch_size), ("clips", len(clips))):
            if number < 1:
                raise ValueError(f"callbacks.{name}.{key}: {number} must be at least 1.")
        if prompt not in ("seen", "away"):
            raise ValueError(f"callbacks.{name}.prompt={prompt!r} must be 'seen' or 'away'.")
        self.clips, self.rollout, self.name, self.prompt = list(clips), rollout, name, prompt
        self.count, self.batch_size, self.seed = count, batch_size, seed

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        evaluate_at_end(trainer, self.name, lambda: self.measure(pl_module))

    @torch.no_grad()
    def measure(self, task: Any) -> dict[str, float]:
        """Returns the metrics without their prefix.

        Args:
            task: task with ``model``, ``tokenizer`` (``encode_ids``, ``decode_ids``) and ``device``.
        """
        task.model.eval()
        metrics: dict[str, float] = {}
        for clips in self.clips:
            values = self._measure(task, clips)
            if repeated := metrics.keys() & values.keys():
                raise ValueError(
                    f"callbacks.{self.name}.clips: two datasets measure {min(repeated)}: keep one of them."
                )
            metrics |= values
        return metrics

    def _measure(self, task: Any, clips: Clips) -> dict[str, float]:
        if len(clips) < self.count:
            raise ValueError(f"callbacks.{self.name}.count={self.count} is more than the {len(clips)} clips.")
        parts: dict[str, list[Objects]] = {"": [], "_reset": [], "_coded": [], "_real": []}
        labels: dict[str, list[Tensor]] = {name: [] for name in CHANCE}
        unseen: set[int] = set()
        for first in range(0, self.count, self.batch_size):
            indices = range(first, min(first + self.batch_size, self.count))
            batch = [clips[index] for index in indices]
            if any(not torch.equal(clip["visible"], batch[0]["visible"]) for clip in batch):
                raise ValueError(f"callbacks.{self.name}.clips: all clips need the same unseen frames: set one number.")
            unseen.add(int((~batch[0]["visible"]).sum()))
            for name, classes in labels.items():
                classes.append(torch.tensor([clip["labels"][name] for clip in batch]))
            for suffix, objects in self._read(task, batch, [self.seed + index for index in indices]).items():
                parts[suffix].append(objects)
        if len(unseen) > 1:
            raise ValueError(f"callbacks.{self.name}.clips: all clips need the same unseen frames: set one number.")
        read = {suffix: Objects(*(torch.cat(values) for values in zip(*each))) for suffix, each in parts.items()}
        truth, real, number = {name: torch.cat(values) for name, values in labels.items()}, read["_real"], unseen.pop()
        metrics: dict[str, float] = {}
        for suffix, objects in read.items():
            shares = {**accuracies(objects, truth), "found": (objects.colour != NONE).float().mean().item()}
            if objects is not real:
                shares["overlap"] = mask_overlap(objects, real)
            metrics |= {f"{name}_{number}{suffix}": share for name, share in shares.items()}
        control = max(metrics[f"colour_{number}_reset"], CHANCE["colour"])
        metrics[f"colour_{number}_gain"] = metrics[f"colour_{number}"] - control
        other = Objects(*(values.roll(1, 0) for values in real))
        trivial = {**CHANCE, "overlap": mask_overlap(other, real)}
        return metrics | {f"{name}_{number}_trivial": value for name, value in trivial.items()}

    def _read(self, task: Any, batch: list[dict], seeds: list[int]) -> dict[str, Objects]:
        """Objects of the returned frames of clips, by suffix of the metrics."""
        video = torch.stack([clip["video"] for clip in batch]).to(task.device).transpose(1, 2).float() / 127.5 - 1
        ids = task.tokenizer.encode_ids(video)
        stride = (video.shape[2] - 1) // max(1, ids.shape[1] - 1)
        away = Away.of(batch[0]["visible"], stride)
        actions = torch.stack([clip["actions"] for clip in batch]).to(task.device).unflatten(1, (-1, stride))
        prompt = ids[:, : away.seen if self.prompt == "seen" else away.back]
        made = {
            suffix: self.rollout(task.model, prompt, actions, reset_at, seeds)
            for suffix, reset_at in (("", None), ("_reset", away.reset))
        }
        videos = {suffix: task.tokenizer.decode_ids(each) for suffix, each in {**made, "_coded": ids}.items()}
        returned = {suffix: each[:, :, away.last + 2 :] for suffix, each in {**videos, "_real": video}.items()}
        return {suffix: Objects(*(value.cpu() for value in read_objects(each))) for suffix, each in returned.items()}
