"""Rule-based evaluation of clips generated from captions of moving shapes, at the end of a run."""

import itertools
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from blueberry_video.evaluation.end_of_run import evaluate_at_end
from blueberry_video.evaluation.shape_metrics import COLOURS, DIRECTIONS, SHAPES, accuracies, caption_labels


class GeneratedShapes(Callback):
    """Samples clips for all 36 captions of moving shapes, equally many each, and logs how many match their caption.

    Logs the shares ``sampling/colour``, ``sampling/shape`` and ``sampling/direction``, each with ``_trivial`` (chance
    level) and with ``_shuffled_captions``, of the same clips compared with the captions of others; and
    ``sampling/direction_shuffled``, of the same clips with shuffled frames.

    The task must have ``generate(captions, generator) -> (B, 3, T, H, W)`` in [-1, 1].

    Args:
        clips: number of clips, a multiple of 36.
        batch_size: clips sampled together.
        seed: seed of the noise and of the frame orders.

    Raises:
        ValueError: for numbers out of range.
    """

    def __init__(self, clips: int = 144, batch_size: int = 72, seed: int = 0) -> None:
        if clips < 36 or clips % 36 or batch_size < 1:
            raise ValueError(
                f"callbacks.sampling.clips={clips} must be a multiple of the 36 captions, such as 144, and "
                f"callbacks.sampling.batch_size={batch_size} at least 1."
            )
        self.clips, self.batch_size, self.seed = clips, batch_size, seed

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        evaluate_at_end(trainer, "sampling", lambda: self.measure(pl_module))

    @torch.no_grad()
    def generate(self, task: Any, generator: torch.Generator | None = None) -> tuple[Tensor, list[str]]:
        """Returns generated clips (N, 3, T, H, W) and their captions; the default generator has the seed."""
        classes = itertools.product(COLOURS, SHAPES, DIRECTIONS)
        captions = [f"a {colour} {shape} moves {direction}" for colour, shape, direction in classes]
        captions *= self.clips // len(captions)
        generator = generator or torch.Generator().manual_seed(self.seed)
        parts = [captions[first : first + self.batch_size] for first in range(0, self.clips, self.batch_size)]
        return torch.cat([task.generate(part, generator).float() for part in parts]), captions

    def measure(self, task: Any) -> dict[str, float]:
        """Returns the metrics without their prefix."""
        generator = torch.Generator().manual_seed(self.seed)
        video, captions = self.generate(task, generator)
        labels = caption_labels(captions)
        order = torch.stack([torch.randperm(video.shape[2], generator=generator) for _ in captions]).to(video.device)
        shuffled = video.gather(2, order[:, None, :, None, None].expand_as(video))
        own, mixed = accuracies(video, labels), accuracies(shuffled, labels)["direction"]
        others = torch.randperm(len(captions), generator=generator)
        apart = accuracies(video, {name: values[others] for name, values in labels.items()})
        chance = {"colour": 1 / len(COLOURS), "shape": 1 / len(SHAPES), "direction": 1 / len(DIRECTIONS)}
        return {
            **own,
            **{f"{name}_trivial": share for name, share in chance.items()},
            **{f"{name}_shuffled_captions": share for name, share in apart.items()},
            "direction_shuffled": mixed,
        }
