"""Measures of representation collapse, and a callback that raises an alarm.

The loss does not show a collapse: it is zero when every clip has the same embedding. No single measure does either:
layer-normalized embeddings have a fixed spread and collapse onto a line, which only their rank shows. Tokens at
different positions differ through their position embeddings even where the encoder ignores the video, so all measures
compare clips at the same position.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from blueberry_video.parallel.fsdp import full, gathered


def feature_std(latents: Tensor) -> Tensor:
    """Standard deviation over clips per dimension (biased), averaged over the N positions: (B, N, D) -> (D,)."""
    latents = latents.float()
    return (latents - latents.mean(dim=0)).square().mean(dim=0).sqrt().mean(dim=0)


def effective_rank(latents: Tensor) -> Tensor:
    """Effective rank of the differences between clips: (B, N, D) -> scalar, 1 to D; 0 if all clips are equal.

    Exponential of the entropy of the normalized singular values (Roy & Vetterli 2007) of the tokens minus the mean of
    their position.
    """
    centred = (latents.double() - latents.double().mean(dim=0)).flatten(0, 1)
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0).sqrt()  # D x D, as B N >> D
    total = values.sum()
    if total <= 1e-6 * latents.norm():
        return torch.zeros_like(total)
    return torch.special.entr(values / total).sum().exp()


def cross_clip_cosine(latents: Tensor) -> Tensor:
    """Mean cosine similarity of two clips at the same position: (B, N, D) -> scalar; 1 if all clips are equal.

    Raises:
        ValueError: for a single clip.
    """
    clips = len(latents)
    if clips < 2:
        raise ValueError(
            f"cross_clip_cosine of a batch of {clips} requires at least two clips: use data.batch_size=2 or more."
        )
    total = F.normalize(latents.float(), dim=2).sum(dim=0).square().sum(dim=1)  # (N,): over all pairs, i = j included
    return ((total - clips) / (clips * (clips - 1))).mean()


def parameter_distance(online: nn.Module, target: nn.Module) -> Tensor:
    """Euclidean distance of the weights of two networks of one architecture, relative to the norm of the second."""
    first, second = ([parameter.detach().float() for parameter in m.parameters()] for m in (online, target))
    difference = torch.nn.utils.get_total_norm(torch._foreach_sub(first, second))
    return full(difference) / full(torch.nn.utils.get_total_norm(second))


class CollapseMonitor(Callback):
    """Monitors the embeddings that a task predicts, on the training batches.

    Each process measures its own batch, and the values are averaged over processes. They depend on the batch size:
    ``effective_rank`` is below the number of clips times positions, and a standard deviation over B clips is too small
    by about 1 / (2 B). So thresholds are for the batch size of the run.

    Logs ``collapse/target_std`` (mean over dimensions) and ``target_std_min`` (minimum), ``effective_rank``,
    ``cross_clip_cosine``, ``ema_distance`` if the model has a target encoder, and ``alarm``: 0, and 1 for the rest of
    the run once ``patience`` consecutive checks found a collapse. A collapse is a standard deviation below
    ``min_std``, a rank below ``min_rank`` or a cosine above ``max_cosine``.

    The task must have ``latents(video) -> (B, N, D)``, the prediction targets, of unit scale.

    Args:
        every_n_steps: optimizer steps between two checks; each check is a forward pass of the target encoder.
        after_steps: initial steps without alarm, since the embeddings of an untrained encoder hardly differ.
        min_std, min_rank, max_cosine: thresholds of a collapse.
        patience: consecutive checks before the alarm.
        stop: stops training at the alarm.

    Raises:
        ValueError: for arguments out of range; when training begins, if the task has no ``latents``, or for batches of
            one clip.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        after_steps: int = 300,
        min_std: float = 0.05,
        min_rank: float = 3.0,
        max_cosine: float = 0.999,
        patience: int = 2,
        stop: bool = False,
    ) -> None:
        if every_n_steps < 1 or patience < 1:
            raise ValueError(
                f"callbacks.collapse.every_n_steps={every_n_steps} and patience={patience} must be 1 or more."
            )
        self.every_n_steps, self.after_steps, self.patience, self.stop = every_n_steps, after_steps, patience, stop
        self.min_std, self.min_rank, self.max_cosine = min_std, min_rank, max_cosine
        self._last_step = -1
        self._consecutive, self.alarm = 0, False
        self.stop_reason: str | None = None  # shown in the summary of the run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "latents"):
            raise ValueError(
                f"callbacks.collapse requires a task that predicts embeddings, not task={type(pl_module).__name__}: "
                "set callbacks.collapse=null, or use task=latent_prediction."
            )
        if getattr(getattr(trainer, "datamodule", None), "batch_size", 2) < 2:
            raise ValueError(
                "callbacks.collapse compares the clips of a batch, and data.batch_size=1 has one clip: use "
                "data.batch_size=2 or more, or callbacks.collapse=null."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every_n_steps or step == self._last_step:
            return
        self._last_step = step
        values = self._measure(trainer, pl_module, batch["video"])
        if step > self.after_steps:
            self._update_alarm(trainer, values)
        metrics = {f"collapse/{name}": value for name, value in values.items()}
        self._log(trainer, {**metrics, "collapse/alarm": torch.tensor(float(self.alarm))})

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self._consecutive, "alarm": self.alarm}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._consecutive, self.alarm = state_dict["in_a_row"], state_dict["alarm"]

    def _log(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        """Logs to the row of this step; ``log_dict`` would repeat the values in the rows of later steps."""
        trainer.callback_metrics.update(metrics)
        trainer.logged_metrics.update(metrics)
        row = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics({name: float(value) for name, value in metrics.items()}, step=row)

    @torch.no_grad()
    def _measure(self, trainer: Trainer, pl_module: LightningModule, video: Tensor) -> dict[str, Tensor]:
        was_training = pl_module.training
        with gathered(pl_module):
            latents = pl_module.eval().latents(video)  # type: ignore[operator]
        pl_module.train(was_training)
        std = feature_std(latents)
        values = {
            "target_std": std.mean(),
            "target_std_min": std.min(),
            "effective_rank": effective_rank(latents),
            "cross_clip_cosine": cross_clip_cosine(latents),
        }
        model: Any = pl_module.model
        if getattr(model, "target_encoder", None) is not None:
            values["ema_distance"] = parameter_distance(model.encoder, model.target_encoder)
        # equal on all processes, since they must stop together
        return {name: trainer.strategy.reduce(value, reduce_op="mean") for name, value in values.items()}

    def _update_alarm(self, trainer: Trainer, values: dict[str, Tensor]) -> None:
        std, rank, cosine = (float(values[name]) for name in ("target_std", "effective_rank", "cross_clip_cosine"))
        collapsed = std < self.min_std or rank < self.min_rank or cosine > self.max_cosine
        self._consecutive = self._consecutive + 1 if collapsed else 0
        if self._consecutive < self.patience or self.alarm:
            return
        self.alarm = True
        warnings.warn(
            f"collapse at step {trainer.global_step}: between clips the predicted embeddings have a standard deviation "
            f"of {std:.3g} (alarm below {self.min_std}), an effective rank of {rank:.3g} (below {self.min_rank}) and a "
            f"cosine of {cosine:.4g} (above {self.max_cosine}). The loss is no longer meaningful: raise the momentum, "
            "lower optimizer.lr, or use SIGReg.",
            stacklevel=2,
        )
        if self.stop:
            trainer.should_stop = True
            self.stop_reason = f"callbacks.collapse.stop={self.stop} and a collapse at step {trainer.global_step}"
