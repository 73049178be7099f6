"""Probing and few-label fine-tuning of an encoder at the end of a training run.

Self-supervised features are compared with those of the same network untrained, and accuracy on labels of motion with
the accuracy on shuffled frames.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy

from blueberry_video.evaluation.end_of_run import evaluate_at_end
from blueberry_video.evaluation.supervised import LabelledClips, Normalize, Recipe, encode, fine_tune, fit_probe, score
from blueberry_video.evaluation.trivial import majority_share
from blueberry_video.models.encoder import Encoder
from blueberry_video.nn.heads import ClassificationHead


class _EncoderEvaluation(Callback, ABC):
    """Trains a classifier on the trained and on the untrained encoder (same seed) and logs both accuracies.

    The untrained encoder is copied before ``init_from`` or a checkpoint is loaded, so a resumed run uses the same one.
    """

    reference: ClassVar[str]  # suffix of the metrics of the untrained encoder
    train_key: ClassVar[str]  # argument with the number of training clips

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
        self, encoder: Encoder, clips: LabelledClips, num_classes: dict[str, int], normalize: Normalize, recipe: Recipe
    ) -> tuple[Encoder, ClassificationHead]:
        """Returns the encoder and, on the CPU, the head that together predict the labels."""

    def measure(self, task: Any, data: Any) -> dict[str, float]:
        """Returns the metrics without their prefix; the subclasses document the names.

        Args:
            task: has ``model.encoder`` and ``normalize``.
            data: has ``train`` and ``val``, ``classes`` and ``reversal_pairs``.

        Raises:
            ValueError: if the data lacks the part or a label, or the part has too few clips.
        """
        assert self.untrained is not None, "setup runs first"
        train = LabelledClips.of(self._chosen("train", data.train), self.train_clips, self.labels)
        val = LabelledClips.of(self._chosen("val", data.val), self.val_clips, self.labels)
        num_classes = {label: len(data.classes[label]) for label in self.labels}
        pairs = data.reversal_pairs if val.video.shape[1] > 1 else {}  # a single frame is its own reversal

        def scores(encoder: Encoder, head: ClassificationHead, clips: LabelledClips) -> dict[str, float]:
            return score(head, encode(encoder, clips.video, task.normalize), clips.labels, pairs)

        def best(start: Encoder) -> tuple[tuple[Encoder, ClassificationHead], dict[str, float]]:
            """Returns the best model over the learning rates and its scores: each encoder has its own best rate."""
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
        """Returns the part of a mixture to evaluate on, or the whole dataset if ``part`` is ``None``."""
        if self.part is None:
            return dataset
        parts = getattr(dataset, "parts", {})
        if self.part not in parts:
            raise ValueError(
                f"callbacks.{self.name}.part={self.part!r} is not a part of data.{split}: choose one of "
                f"{', '.join(parts) or 'none (the data is no mixture)'}, or null for all of the data."
            )
        return parts[self.part]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                f"callbacks.{self.name} requires an unsharded encoder, but trainer.strategy="
                f"{type(trainer.strategy).__name__} shards it: set callbacks.{self.name}=null and probe the finished "
                "run with task=classification and init_from."
            )
        if stage == "fit":
            self._check(getattr(trainer, "datamodule", None))
            self.untrained = copy.deepcopy(pl_module.model.encoder)  # type: ignore[union-attr, assignment]

    def _check(self, data: Any) -> None:
        """Checks before training that the data has the part, the clips and the labels that the end of the run needs."""
        if data is None:
            return
        for split, key, count in (("train", self.train_key, self.train_clips), ("val", "val_clips", self.val_clips)):
            dataset = self._chosen(split, getattr(data, split))
            if not 1 <= count <= len(dataset):
                raise ValueError(
                    f"callbacks.{self.name}.{key}={count} must be from 1 to {len(dataset)}, the number of clips of "
                    f"data.{split}: set callbacks.{self.name}.{key}={len(dataset)} or less, or add clips."
                )
            known = dataset[0].get("labels", {})
            for label in self.labels:
                if label not in known or label not in data.classes:
                    raise ValueError(
                        f"callbacks.{self.name}.labels={list(self.labels)}: {label!r} is not a label of the clips of "
                        f"data.{split}: choose from {', '.join(sorted(known)) or 'none (the clips have no labels)'}, "
                        f"or set callbacks.{self.name}=null."
                    )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        evaluate_at_end(trainer, self.name, lambda: self.measure(pl_module, trainer.datamodule))  # type: ignore[attr-defined]


class Probe(_EncoderEvaluation):
    """Trains a classification head on the frozen encoder at the end of the run.

    Logs for every label ``<name>/<label>`` with ``_random_init`` (same-seed untrained encoder), ``_gain`` (the
    difference), ``_trivial`` (most frequent class) and, for labels with reversal pairs, ``_shuffled``;
    ``<label>_within_pairs`` likewise, with a chance level of 0.5 as ``_trivial``.

    Args:
        labels: names of the labels to predict.
        pooling: ``"linear"``: mean of the tokens and a linear layer; ``"attentive"``: one learnable query.
        name: prefix of the metrics.
        train_clips, val_clips: number of training and validation clips, from the start of each dataset.
        steps, batch_size, lr, weight_decay, seed: settings of training the head.
        part: name of the mixture part to evaluate on, in training and validation; ``None`` for data that is no mixture.
            Single frames have no shuffled control.
    """

    reference, train_key = "random_init", "train_clips"

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
        self, encoder: Encoder, clips: LabelledClips, num_classes: dict[str, int], normalize: Normalize, recipe: Recipe
    ) -> tuple[Encoder, ClassificationHead]:
        tokens = encode(encoder, clips.video, normalize)
        return encoder, fit_probe(tokens, clips.labels, num_classes, self.pooling, recipe)


class FewLabels(_EncoderEvaluation):
    """Fine-tunes the encoder on few labeled clips at the end of the run, and the same network from scratch.

    Both use the same clips, order and steps, and each the best of the same learning rates on the validation clips: a
    network from scratch requires a different rate than a trained one, and at a single rate the difference would
    measure the rate. Logs for every label ``<name>/<label>`` with ``_scratch``, ``_gain`` (the difference),
    ``_trivial`` and, for labels with reversal pairs, ``_shuffled``; ``<label>_within_pairs`` likewise, with a chance
    level of 0.5 as ``_trivial``.

    Args:
        labels: names of the labels to predict.
        num_labelled: number of training clips.
        name: prefix of the metrics.
        val_clips: number of validation clips.
        lrs: learning rates to try.
        steps, batch_size, weight_decay, seed: settings of the fine-tuning.
        part: name of the mixture part to evaluate on, in training and validation; ``None`` for data that is no mixture.
            Single frames have no shuffled control.
    """

    reference, train_key = "scratch", "num_labelled"

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
            raise ValueError(f"callbacks.{name}.lrs={lrs} is empty: use at least one learning rate.")
        recipes = [Recipe(steps, batch_size, lr, weight_decay, seed) for lr in lrs]
        super().__init__(name, labels, num_labelled, val_clips, recipes, part)

    def learn(
        self, encoder: Encoder, clips: LabelledClips, num_classes: dict[str, int], normalize: Normalize, recipe: Recipe
    ) -> tuple[Encoder, ClassificationHead]:
        return fine_tune(encoder, clips, num_classes, normalize, recipe)
