"""Action anticipation: classifies the end of a clip from its beginning (V-JEPA 2, arXiv 2506.09985)."""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.evaluation.metrics import accuracy, mean_class_recall, recalled_by_class, shuffle_frames
from blueberry_video.evaluation.reference import clip_seeds
from blueberry_video.models.jepa.anticipator import Anticipator
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.nn.patches import gather_tokens
from blueberry_video.tasks.base import Task
from blueberry_video.tasks.settings import ClipInput, Optimization


def focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss (arXiv 1708.02002), summed over classes, averaged over clips.

    Each class is a binary problem with loss -w (1 - p)^gamma log p, where p is the probability of the correct answer
    and w is ``alpha`` for the true class and 1 - alpha for all other classes. V-JEPA 2 also sums over clips, which
    leaves the steps of Adam unchanged.

    Args:
        logits: (B, classes).
        labels: (B,) long.
    """
    yes = F.one_hot(labels, logits.shape[1]).bool()
    z = torch.where(yes, logits.float(), -logits.float())  # p = sigmoid(z)
    weight = torch.where(yes, alpha, 1 - alpha)
    hard = (gamma * F.logsigmoid(-z)).exp()  # (1 - p)^gamma; as a power it has no finite gradient where 1 - p is 0
    return -(weight * hard * F.logsigmoid(z)).sum(dim=1).mean()


class Anticipation(Task):
    """Focal loss over one or several labels of the end of a clip.

    The model receives ``seen`` frames that end some frames earlier, and the gap in tubelets. Logs ``loss`` and, for
    each label, the accuracy under its name and in validation the mean-class recall at ``recall_at`` over all clips as
    ``<label>_recall``. Controls: ``…_trivial`` (the most frequent class; a constant set of ``recall_at`` classes); with
    a frozen model ``…_random_init`` (a head on an untrained model of the same seed, trained alongside); for labels with
    classes that are reversals of each other ``<label>_shuffled`` (input frames in random order).

    Args:
        model, optimization, input: see :class:`~blueberry_video.tasks.base.Task`.
        seen: number of input frames, fewer than the clips have; 32 at 8 fps in V-JEPA 2.
        gap: smallest and largest number of frames from the input to the end of the clip in training, drawn per clip;
            2 to 14 (0.25 to 1.75 s) in V-JEPA 2.
        val_gap: number of frames in validation; 8 (1 s) on EPIC-KITCHENS-100.
        recall_at: k of recall at k; 5 on EPIC-KITCHENS-100.
        valid_classes: label -> classes that recall may predict; ``None``, or a label that it lacks: all.
        alpha, gamma: see :func:`focal_loss`.
        weights_of: encoder to load from the file ``init_from``, ``"target_encoder"`` or ``"encoder"``.
        num_pictures: number of clips in :meth:`media`.

    Raises:
        ValueError: if ``model`` is not an Anticipator, for numbers out of range, frames that are not whole tubelets,
            clips that are too short, or an encoder with absolute positions.
    """

    trains = Anticipator
    model: Anticipator

    def __init__(
        self,
        model: Anticipator,
        optimization: Optimization,
        seen: int,
        gap: tuple[int, int],
        val_gap: int,
        input: ClipInput | None = None,
        recall_at: int = 5,
        valid_classes: dict[str, list[int]] | None = None,
        alpha: float = 0.25,
        gamma: float = 2.0,
        weights_of: str = "target_encoder",
        num_pictures: int = 6,
    ):
        super().__init__(model, optimization, input)
        self.seen, self.gap, self.val_gap = seen, tuple(gap), val_gap
        self.recall_at, self.alpha, self.gamma = recall_at, alpha, gamma
        self.weights_of, self.num_pictures = weights_of, num_pictures
        self.valid_classes = dict(valid_classes or {})
        self._check()
        self.untrained = copy.deepcopy(model) if model.freeze else None  # before init_from is loaded
        self._recalled: dict[str, Tensor] = {}

    def _check(self) -> None:
        encoder = self.model.encoder
        tubelet, frames = encoder.patch_size[0], encoder.video_size[1]
        if isinstance(encoder, VisionTransformer) and encoder.rope is None:
            raise ValueError(
                f"model.encoder.positions={encoder.position_kind} fits whole clips only, but the encoder receives "
                f"task.seen={self.seen} frames: set model.encoder.positions=rope_3d."
            )
        if self.seen < tubelet or self.seen % tubelet:
            raise ValueError(f"task.seen={self.seen} must be a multiple of the tubelet size {tubelet}.")
        whole = all(type(frames) is int for frames in (*self.gap, self.val_gap))
        if not whole or len(self.gap) != 2 or not 0 <= self.gap[0] <= self.gap[1] or self.val_gap < 0:
            raise ValueError(
                f"task.gap={list(self.gap)} must be the smallest and largest number of frames, such as [2, 14], and "
                f"task.val_gap={self.val_gap} a number of frames of at least 0, such as 8."
            )
        if unknown := self.valid_classes.keys() - self.model.num_classes.keys():
            raise ValueError(
                f"task.valid_classes has the labels {sorted(unknown)}, but model.num_classes="
                f"{self.model.num_classes} does not."
            )
        if self.recall_at < 1 or not 0 <= self.alpha <= 1 or self.gamma < 0:
            raise ValueError(
                f"task.recall_at={self.recall_at} must be at least 1, task.alpha={self.alpha} in [0, 1] and "
                f"task.gamma={self.gamma} at least 0."
            )
        longest = self.seen + max(self.gap[1], self.val_gap)
        if frames < longest:
            raise ValueError(
                f"clips of {frames} frames are too short for task.seen={self.seen} and gaps of up to "
                f"{longest - self.seen}: set model.encoder.num_frames={-(-longest // tubelet) * tubelet} or more."
            )

    def load_weights(self, path: str | Path) -> str:
        return self.model.load_published(path, self.weights_of)

    def shared_step(self, batch: dict, stage: str) -> dict[str, Tensor]:
        gap = self._gaps(len(batch["video"]), stage).to(batch["video"].device)
        seen, skip = self.before(batch["video"], gap), gap // self.model.encoder.patch_size[0]
        inputs = self.normalize(seen)
        networks = {"": self.model} | ({} if self.untrained is None else {"_random_init": self.untrained})
        values: dict[str, Tensor] = {}
        for suffix, network in networks.items():
            logits = network(inputs, skip)
            labels = {name: batch["labels"][name] for name in logits}
            losses = [focal_loss(logits[name], labels[name], self.alpha, self.gamma) for name in logits]
            loss = torch.stack(losses).sum()
            # the loss of the model, the gradients of both
            values["loss"] = values["loss"] + (loss - loss.detach()) if suffix else loss
            values |= {f"{name}{suffix}": accuracy(logits[name], labels[name]) for name in logits}
            if stage != "train":
                self._count(logits, labels, suffix)
        if stage == "train":
            return values
        named = self.trainer.datamodule.reversal_pairs.keys() & labels.keys()  # type: ignore[attr-defined]
        if named:
            mixed = self.model(self.normalize(shuffle_frames(seen, clip_seeds(batch))), skip)
            values |= {f"{name}_shuffled": accuracy(mixed[name], labels[name]) for name in sorted(named)}
        return values

    def before(self, video: Tensor, gap: Tensor) -> Tensor:
        """The ``seen`` frames that end ``gap`` (B,) frames before the end of each clip (B, C, T, H, W)."""
        first = video.shape[2] - gap - self.seen
        frames = first[:, None] + torch.arange(self.seen, device=video.device)
        return gather_tokens(video.transpose(1, 2), frames).transpose(1, 2)

    def _gaps(self, batch_size: int, stage: str) -> Tensor:
        fewest, most = self.gap if stage == "train" else (self.val_gap, self.val_gap)
        return torch.randint(fewest, most + 1, (batch_size,))

    def _count(self, logits: dict[str, Tensor], labels: dict[str, Tensor], suffix: str) -> None:
        for name, label in labels.items():
            counts = recalled_by_class(logits[name], label, self.recall_at, self.valid_classes.get(name))
            self._recalled[f"{name}_recall{suffix}"] = self._recalled.get(f"{name}_recall{suffix}", 0) + counts

    def epoch_metrics(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        values = {}
        for key, counts in self._recalled.items():
            counts = self.trainer.strategy.reduce(counts.float(), reduce_op="sum")
            values[key] = mean_class_recall(counts)
            if key.endswith("_recall"):
                clips, occurring = counts[1], (counts[1] > 0).sum()
                values[f"{key}_trivial"] = (self.recall_at / occurring).clamp(max=1)
                values[f"{key.removesuffix('_recall')}_trivial"] = clips.max() / clips.sum()
        self._recalled.clear()
        return values

    def media(self, batch: dict) -> dict[str, Tensor]:
        """``clips``: one row per clip: the clip, and the validation input with its last frame repeated."""
        video = batch["video"][: self.num_pictures]
        seen = self.before(video, self._gaps(len(video), "val").to(video.device))
        held = seen[:, :, -1:].expand(-1, -1, video.shape[2] - self.seen, -1, -1)
        return {"clips": self.panels([video, torch.cat([seen, held], dim=2)])}
