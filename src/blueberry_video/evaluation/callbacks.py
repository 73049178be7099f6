"""Evaluations at the end of a training run, each beside its controls.

What an encoder learned without labels is worth what it adds to the same network untrained, and a claim about motion
only stands where shuffled frames make it fall: both are always measured along.
"""

import copy
from typing import Literal, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from blueberry_video.evaluation.supervised import LabelledClips, Recipe, encode, fine_tune, fit_probe, score
from blueberry_video.evaluation.trivial import majority_share
from blueberry_video.nn.encoder import Encoder


class _EncoderEvaluation(Callback):
    """Keeps a copy of the untrained encoder, and at the end of training logs what a subclass measures.

    The copy is made before a checkpoint is loaded: a resumed run compares with the same one.
    """

    def __init__(self, labels: list[str], train_clips: int, val_clips: int, recipe: Recipe):
        self.labels = tuple(labels)
        self.train_clips, self.val_clips, self.recipe = train_clips, val_clips, recipe
        self.untrained: Encoder | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.untrained = copy.deepcopy(cast(Encoder, cast(nn.Module, pl_module.model).encoder))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        train = LabelledClips.of(data.train, self.train_clips, self.labels)
        val = LabelledClips.of(data.val, self.val_clips, self.labels)
        assert self.untrained is not None, "setup runs before on_train_end"
        untrained = self.untrained.to(pl_module.device)
        values = self.measure(pl_module, untrained, train, val, data.classes, data.reversal_pairs)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})

    def measure(self, task, untrained, train, val, classes, pairs) -> dict[str, float]:
        raise NotImplementedError(f"{type(self).__name__} must say what it measures.")


class Probe(_EncoderEvaluation):
    """Trains a small head on the frozen encoder at the end of the run.

    Logs for every label ``<name>/<label>`` with ``_random_init`` (the same-seed untrained encoder), ``_trivial`` (the
    most frequent class) and, for labels that live in the order of frames, ``_shuffled``.

    Args:
        labels: names of the labels to predict.
        pooling: ``"linear"``: mean of the tokens and a linear layer; ``"attentive"``: one learnable query.
        name: prefix of the metrics.
        train_clips, val_clips: how many of the first training and validation clips are used.
        steps, batch_size, lr, weight_decay, seed: of the head's training.
    """

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
    ):
        super().__init__(labels, train_clips, val_clips, Recipe(steps, batch_size, lr, weight_decay, seed))
        self.name, self.pooling = name, {"linear": "mean", "attentive": "attentive"}[pooling]

    def measure(self, task, untrained, train, val, classes, pairs) -> dict[str, float]:
        num_classes = {label: len(classes[label]) for label in self.labels}
        shuffled = val.shuffled(self.recipe.seed)
        values = {f"{self.name}/{label}_trivial": majority_share(val.labels[label]) for label in self.labels}
        for suffix, encoder in (("", task.model.encoder), ("_random_init", untrained)):
            tokens = encode(encoder, train.video, task.normalize)
            head = fit_probe(tokens, train.labels, num_classes, self.pooling, self.recipe)
            for control, clips in (("", val), ("_shuffled", shuffled)):
                if suffix and control:
                    continue
                scores = score(head, encode(encoder, clips.video, task.normalize), clips.labels, pairs)
                values |= _named(scores, self.name, suffix + control, only=pairs if control else None)
        return values


class FewLabels(_EncoderEvaluation):
    """Fine-tunes the encoder on few labelled clips at the end of the run, against the same network from scratch.

    Both get the same clips, order, steps and learning rate. Logs for every label ``<name>/<label>`` with ``_scratch``,
    ``_trivial`` and, for labels that live in the order of frames, ``_shuffled``; and ``<label>_within_pairs`` likewise.

    Args:
        labels: names of the labels to predict.
        num_labelled: clips to learn from.
        name: prefix of the metrics.
        val_clips: clips to measure on.
        steps, batch_size, lr, weight_decay, seed: of the fine-tuning.
    """

    def __init__(
        self,
        labels: list[str],
        num_labelled: int = 400,
        name: str = "few_labels",
        val_clips: int = 1000,
        steps: int = 600,
        batch_size: int = 32,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        seed: int = 0,
    ):
        super().__init__(labels, num_labelled, val_clips, Recipe(steps, batch_size, lr, weight_decay, seed))
        self.name = name

    def measure(self, task, untrained, train, val, classes, pairs) -> dict[str, float]:
        num_classes = {label: len(classes[label]) for label in self.labels}
        shuffled = val.shuffled(self.recipe.seed)
        values = {f"{self.name}/{label}_trivial": majority_share(val.labels[label]) for label in self.labels}
        for suffix, encoder in (("", task.model.encoder), ("_scratch", untrained)):
            tuned, head = fine_tune(encoder, train, num_classes, task.normalize, self.recipe)
            for control, clips in (("", val), ("_shuffled", shuffled)):
                if suffix and control:
                    continue
                scores = score(head, encode(tuned, clips.video, task.normalize), clips.labels, pairs)
                values |= _named(scores, self.name, suffix + control, only=pairs if control else None)
        return values


def _named(scores: dict[str, float], prefix: str, suffix: str, only) -> dict[str, float]:
    """Scores under their metric names; ``only`` those of labels with reversal pairs, where shuffling is a control."""
    return {
        f"{prefix}/{label}{suffix}": value
        for label, value in scores.items()
        if only is None or label.removesuffix("_within_pairs") in only
    }
