"""Evaluations at the end of a training run, each beside its controls.

What an encoder learned without labels is worth what it adds to the same network untrained, and a claim about motion
only stands where shuffled frames make it fall: both are always measured along.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from blueberry_video.evaluation.supervised import (
    LabelledClips,
    Normalize,
    Recipe,
    encode,
    fine_tune,
    fit_probe,
    score,
)
from blueberry_video.evaluation.trivial import majority_share
from blueberry_video.models.encoder import Encoder
from blueberry_video.nn.heads import ClassificationHead


class _EncoderEvaluation(Callback, ABC):
    """Learns labels from the trained encoder and from the same-seed untrained one, and logs how well each did.

    The untrained one is copied before ``init_from`` or a checkpoint is loaded: a resumed run compares with the same.
    """

    reference: ClassVar[str]  # suffix of the untrained encoder's metrics

    def __init__(
        self,
        name: str,
        labels: Sequence[str],
        train_clips: int,
        val_clips: int,
        recipes: Sequence[Recipe],
        part: str | None,
    ):
        self.name, self.labels, self.recipes, self.part = name, tuple(labels), list(recipes), part
        self.train_clips, self.val_clips = train_clips, val_clips
        self.untrained: Encoder | None = None

    @abstractmethod
    def learn(
        self,
        encoder: Encoder,
        clips: LabelledClips,
        num_classes: dict[str, int],
        normalize: Normalize,
        recipe: Recipe,
    ) -> tuple[Encoder, ClassificationHead]:
        """An encoder and, on the CPU, a head that predict the labels."""

    def measure(self, task: Any, data: Any) -> dict[str, float]:
        """Metrics without their prefix; the subclass says which.

        Args:
            task: has ``model.encoder`` and ``normalize``.
            data: has ``train`` and ``val``, ``classes`` and ``reversal_pairs``.

        Raises:
            ValueError: if the data has no such part, too few clips in it, or no such label.
        """
        assert self.untrained is not None, "setup runs first"
        train = LabelledClips.of(self._chosen("train", data.train), self.train_clips, self.labels)
        val = LabelledClips.of(self._chosen("val", data.val), self.val_clips, self.labels)
        num_classes = {label: len(data.classes[label]) for label in self.labels}
        pairs = data.reversal_pairs if val.video.shape[1] > 1 else {}  # a single frame is its own reversal

        def scores(encoder: Encoder, head: ClassificationHead, clips: LabelledClips) -> dict[str, float]:
            return score(head, encode(encoder, clips.video, task.normalize), clips.labels, pairs)

        def best(start: Encoder) -> tuple[tuple[Encoder, ClassificationHead], dict[str, float]]:
            """Of all learning rates the one that serves this encoder best: a fair reference gets its own."""
            learned = [self.learn(start, train, num_classes, task.normalize, recipe) for recipe in self.recipes]
            found = [(model, scores(*model, val)) for model in learned]
            return max(found, key=lambda pair: sum(pair[1][name] for name in self.labels))

        trained, values = best(task.model.encoder)
        _, reference = best(self.untrained.to(task.device))
        in_order = [name for name in values if name.removesuffix("_within_pairs") in pairs]
        shuffled = scores(*trained, val.shuffled(self.recipes[0].seed)) if in_order else {}
        return {
            **values,
            **{f"{name}_{self.reference}": value for name, value in reference.items()},
            **{f"{name}_gain": values[name] - reference[name] for name in self.labels},
            **{f"{name}_shuffled": shuffled[name] for name in in_order},
            **{f"{name}_trivial": majority_share(truth) for name, truth in val.labels.items()},
            **{f"{name}_within_pairs_trivial": 0.5 for name in self.labels if name in pairs},
        }

    def _chosen(self, split: str, dataset: Any) -> Any:
        """The part to evaluate on, of a mixture of several; else all."""
        if self.part is None:
            return dataset
        parts = getattr(dataset, "parts", {})
        if self.part not in parts:
            raise ValueError(
                f"callbacks.{self.name}.part={self.part!r} is not a part of data.{split}: choose one of "
                f"{', '.join(parts) or 'none, it is no mixture'}, or null for all of it."
            )
        return parts[self.part]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise ValueError(
                f"callbacks.{self.name} needs the whole encoder, but trainer.strategy shards it: set it to null here "
                "and probe the finished run with task=classification and init_from."
            )
        if stage == "fit":
            self.untrained = copy.deepcopy(pl_module.model.encoder)  # type: ignore[union-attr, assignment]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        measured = self.measure(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        values = {f"{self.name}/{metric}": value for metric, value in measured.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        trainer.callback_metrics.update({metric: torch.tensor(value) for metric, value in values.items()})


class Probe(_EncoderEvaluation):
    """Trains a small head on the frozen encoder at the end of the run.

    Logs for every label ``<name>/<label>`` with ``_random_init`` (the same-seed untrained encoder), ``_gain`` (the
    difference), ``_trivial`` (the most frequent class) and, for labels whose classes are each other played backwards,
    ``_shuffled``; ``<label>_within_pairs`` likewise, whose trivial value is a coin's.

    Args:
        labels: names of the labels to predict.
        pooling: ``"linear"``: mean of the tokens and a linear layer; ``"attentive"``: one learnable query.
        name: prefix of the metrics.
        train_clips, val_clips: how many of the first training and validation clips are used.
        steps, batch_size, lr, weight_decay, seed: of the head's training.
        part: of mixed data the part to evaluate on, in training and validation; ``None`` is for data of one kind.
            Single frames have no shuffled control.
    """

    reference = "random_init"

    def __init__(
        self,
        labels: list[str],
        pooling: Literal["linear", "attentive"] = "attentive",
        name: str = "probe",
        train_clips: int = 2000,
        val_clips: int = 1000,
        steps: int = 600,
        batch_size: int = 64,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        seed: int = 0,
        part: str | None = None,
    ):
        recipes = [Recipe(steps, batch_size, lr, weight_decay, seed)]
        super().__init__(name, labels, train_clips, val_clips, recipes, part)
        self.pooling = {"linear": "mean", "attentive": "attentive"}[pooling]

    def learn(
        self,
        encoder: Encoder,
        clips: LabelledClips,
        num_classes: dict[str, int],
        normalize: Normalize,
        recipe: Recipe,
    ) -> tuple[Encoder, ClassificationHead]:
        tokens = encode(encoder, clips.video, normalize)
        return encoder, fit_probe(tokens, clips.labels, num_classes, self.pooling, recipe)


class FewLabels(_EncoderEvaluation):
    """Fine-tunes the encoder on few labelled clips at the end of the run, against the same network from scratch.

    Both get the same clips, order and steps, and each the best of the same learning rates, judged on the validation
    clips: a network from scratch wants another one than a trained network, and at one rate the difference would be the
    rate's. Logs for every label ``<name>/<label>`` with ``_scratch``, ``_gain`` (the difference), ``_trivial`` and,
    for labels whose classes are each other played backwards, ``_shuffled``; ``<label>_within_pairs`` likewise, whose
    trivial value is a coin's.

    Args:
        labels: names of the labels to predict.
        num_labelled: clips to learn from.
        name: prefix of the metrics.
        val_clips: clips to measure on.
        lrs: learning rates to try.
        steps, batch_size, weight_decay, seed: of the fine-tuning.
        part: of mixed data the part to evaluate on, in training and validation; ``None`` is for data of one kind.
            Single frames have no shuffled control.
    """

    reference = "scratch"

    def __init__(
        self,
        labels: list[str],
        num_labelled: int = 400,
        name: str = "few_labels",
        val_clips: int = 1000,
        steps: int = 600,
        batch_size: int = 32,
        lrs: Sequence[float] = (5e-4, 1e-3, 2e-3, 4e-3),
        weight_decay: float = 0.05,
        seed: int = 0,
        part: str | None = None,
    ):
        if not lrs:
            raise ValueError("callbacks.few_labels.lrs is empty: give at least one learning rate.")
        recipes = [Recipe(steps, batch_size, lr, weight_decay, seed) for lr in lrs]
        super().__init__(name, labels, num_labelled, val_clips, recipes, part)

    def learn(
        self,
        encoder: Encoder,
        clips: LabelledClips,
        num_classes: dict[str, int],
        normalize: Normalize,
        recipe: Recipe,
    ) -> tuple[Encoder, ClassificationHead]:
        return fine_tune(encoder, clips, num_classes, normalize, recipe)
