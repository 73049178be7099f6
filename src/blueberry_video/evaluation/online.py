"""Quality of an encoder during self-supervised training: nearest neighbors, a linear probe and RankMe."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from blueberry_video.evaluation.supervised import LabelledClips, encode
from blueberry_video.evaluation.trivial import majority_share
from blueberry_video.parallel.fsdp import gathered


def knn_accuracy(
    train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Accuracy of a weighted vote of the nearest neighbors by cosine similarity (Wu et al., arXiv 1805.01978).

    Args:
        train, val: embeddings (N, D) and (M, D).
        train_labels, val_labels: classes, long (N,) and (M,).
        k: neighbors, at most N; each votes with the weight exp(similarity / ``temperature``).
    """
    similarity = F.normalize(val.double(), dim=1) @ F.normalize(train.double(), dim=1).T
    nearest, indices = similarity.topk(min(k, len(train)), dim=1)
    votes = torch.zeros(len(val), int(train_labels.max()) + 1, dtype=torch.double, device=val.device)
    votes.scatter_add_(1, train_labels[indices], (nearest / temperature).exp())
    return float((votes.argmax(dim=1) == val_labels).double().mean())


def ridge_accuracy(
    train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor, penalty: float = 1e-2
) -> float:
    """Accuracy of a linear classifier by ridge regression to one-hot classes, in closed form.

    Args:
        train, train_labels, val, val_labels: see :func:`knn_accuracy`; embeddings are standardized by ``train``.
        penalty: weight of the squared norm of the classifier per training clip.
    """
    mean, std = train.double().mean(dim=0), train.double().std(dim=0, correction=0).clamp(min=1e-6)
    x, y = (train.double() - mean) / std, F.one_hot(train_labels).double()
    center = y.mean(dim=0)
    gram = x.T @ x + penalty * len(x) * torch.eye(x.shape[1], dtype=torch.double, device=x.device)
    weight = torch.linalg.solve(gram, x.T @ (y - center))
    scores = (val.double() - mean) / std @ weight + center
    return float((scores.argmax(dim=1) == val_labels).double().mean())


def rank_me(embeddings: Tensor) -> float:
    """RankMe (Garrido et al., arXiv 2210.02885): exponential of the entropy of the singular values of embeddings
    (N, D), normalized to sum 1; between 1 and min(N, D)."""
    values = torch.linalg.svdvals(embeddings.double())
    shares = values / values.sum().clamp(min=1e-12) + 1e-7
    return float(torch.special.entr(shares).sum().exp())


class OnlineEvaluation(Callback):
    """Measures the encoder every few steps, without changing the training.

    Embeddings are the mean over the tokens of whole clips, of the target encoder if there is one. Logs for each label
    ``<name>/<label>_knn`` and ``<label>_linear``, the accuracies of :func:`knn_accuracy` and :func:`ridge_accuracy` on
    validation clips, with ``<label>_knn_trivial`` and ``<label>_linear_trivial``, the share of the most frequent class;
    and ``<name>/rank_me`` of the validation clips. Only the first process measures.

    Args:
        labels: names of the labels; ``None``: all of the data. Empty for RankMe alone.
        every_n_steps: optimizer steps between two measurements.
        train_clips, val_clips: number of clips, from the start of each dataset, which are kept in memory.
        k: neighbors.
        name: prefix of the metrics.

    Raises:
        ValueError: for numbers below 1; when training begins, if the data lacks a label.
    """

    def __init__(
        self,
        labels: Sequence[str] | None = None,
        every_n_steps: int = 500,
        train_clips: int = 1000,
        val_clips: int = 500,
        k: int = 20,
        name: str = "online",
    ):
        for key, value in (
            ("every_n_steps", every_n_steps),
            ("train_clips", train_clips),
            ("val_clips", val_clips),
            ("k", k),
        ):
            if value < 1:
                raise ValueError(f"callbacks.{name}.{key}={value} must be at least 1.")
        self.labels, self.every_n_steps, self.k, self.name = labels, every_n_steps, k, name
        self.train_clips, self.val_clips = train_clips, val_clips
        self._clips: tuple[LabelledClips, LabelledClips] | None = None
        self._last_step = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        known = set(data.train[0].get("labels", {})) & set(data.val[0].get("labels", {}))
        if missing := sorted(set(self.labels or ()) - known):
            raise ValueError(
                f"callbacks.{self.name}.labels={list(self.labels or ())}: {missing[0]!r} is no label of the clips: "
                f"choose from {', '.join(sorted(known)) or 'none (set labels: [] for RankMe alone)'}."
            )
        self._names = sorted(known) if self.labels is None else list(self.labels)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every_n_steps or step == self._last_step:
            return
        self._last_step = step
        was_training = pl_module.training
        with gathered(pl_module.eval()):
            if trainer.is_global_zero:
                metrics = self.measure(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
                metrics = {f"{self.name}/{key}": value for key, value in metrics.items()}
                trainer.callback_metrics.update({key: torch.tensor(value) for key, value in metrics.items()})
                row = trainer.fit_loop.epoch_loop._batches_that_stepped
                for logger in trainer.loggers:
                    logger.log_metrics(metrics, step=row)
        pl_module.train(was_training)

    @torch.no_grad()
    def measure(self, task: Any, data: Any) -> dict[str, float]:
        """Returns the metrics without their prefix."""
        if self._clips is None:
            sizes = min(self.train_clips, len(data.train)), min(self.val_clips, len(data.val))
            self._clips = (
                LabelledClips.of(data.train, sizes[0], tuple(self._names)),
                LabelledClips.of(data.val, sizes[1], tuple(self._names)),
            )
        encoder = getattr(task.model, "target_encoder", None) or task.model.encoder
        train, val = (
            torch.cat([encode(encoder, part, task.normalize).mean(dim=1) for part in clips.video.split(64)])
            for clips in self._clips
        )
        values = {"rank_me": rank_me(val)}
        for name in self._names:
            truth = [clips.labels[name] for clips in self._clips]
            values[f"{name}_knn"] = knn_accuracy(train, truth[0], val, truth[1], self.k)
            values[f"{name}_linear"] = ridge_accuracy(train, truth[0], val, truth[1])
            for kind in ("knn", "linear"):
                values[f"{name}_{kind}_trivial"] = majority_share(truth[1])
        return values
