"""Is an encoder that predicts its own embeddings collapsing? Measures of it, and a callback that raises the alarm.

The loss cannot tell: where every clip gets the same embedding it is perfect. Nor can one number: layer-normalised
embeddings have a spread by construction, and collapse by all coming to lie on a line, which their rank shows. Tokens at
different places differ, since positions do, also where an encoder no longer looks at the picture: so all is measured
between clips, at one place at a time.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn


def feature_std(latents: Tensor) -> Tensor:
    """Standard deviation between clips, a dimension: (B, N, D) -> (D,), mean over the N places; the biased one."""
    latents = latents.float()
    return (latents - latents.mean(dim=0)).square().mean(dim=0).sqrt().mean(dim=0)


def effective_rank(latents: Tensor) -> Tensor:
    """How many dimensions the differences between clips spread over: (B, N, D) -> scalar, 1 to D; 0 where there are
    none.

    It is the exponential of the entropy of the singular values, as shares of their sum (Roy & Vetterli 2007), of the
    tokens less the mean of their place.
    """
    centred = (latents.double() - latents.double().mean(dim=0)).flatten(0, 1)
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0).sqrt()  # there are far more tokens than dimensions
    total = values.sum()
    if total <= 1e-6 * latents.norm():
        return torch.zeros_like(total)
    return torch.special.entr(values / total).sum().exp()


def cross_clip_cosine(latents: Tensor) -> Tensor:
    """Mean cosine between the embeddings of two clips at the same place: (B, N, D) -> scalar; 1 where all are equal.

    Raises:
        ValueError: for a single clip.
    """
    clips = len(latents)
    if clips < 2:
        raise ValueError("the cosine between clips needs two of them at least: use data.batch_size=2 or more.")
    total = F.normalize(latents.float(), dim=2).sum(dim=0).square().sum(dim=1)  # (N,): over all pairs, with themselves
    return ((total - clips) / (clips * (clips - 1))).mean()


def parameter_distance(online: nn.Module, target: nn.Module) -> Tensor:
    """Euclidean distance of the weights of two equal networks, as a share of the second's length."""
    mine, other = ([parameter.detach().float() for parameter in m.parameters()] for m in (online, target))
    difference = torch.nn.utils.get_total_norm(torch._foreach_sub(mine, other))
    return difference / torch.nn.utils.get_total_norm(other)


class CollapseMonitor(Callback):
    """Watches the embeddings that a task predicts, on the training batches.

    Logs ``collapse/target_std`` (mean over dimensions) and ``target_std_min`` (over dimensions), ``effective_rank``,
    ``cross_clip_cosine``, ``ema_distance`` where the model has a target encoder, and ``alarm``: 1 from the moment that
    ``patience`` looks in a row found a collapse, to the end of the run; 0 before. A collapse is a standard deviation
    below ``min_std``, a rank below ``min_rank`` or a cosine above ``max_cosine``.

    The task must have ``latents(video) -> (B, N, D)``, of scale 1: what it predicts.

    Args:
        every_n_steps: optimiser steps between two looks, each a forward pass of the target encoder.
        after_steps: steps at the start that raise no alarm: an untrained encoder's embeddings hardly differ.
        min_std, min_rank, max_cosine: see above.
        patience: looks in a row.
        stop: end the run at the alarm.

    Raises:
        ValueError: for arguments out of range; when training begins, if the task has no ``latents``.
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
        self._looked_at = -1
        self._in_a_row, self.alarm = 0, False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "latents"):
            raise ValueError(
                f"callbacks.collapse watches embeddings that a task predicts, and {type(pl_module).__name__} predicts "
                "none: set callbacks.collapse=null, or choose task=latent_prediction."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every_n_steps or step == self._looked_at:
            return
        self._looked_at = step
        values = self._measure(trainer, pl_module, batch["video"])
        if step > self.after_steps:
            self._judge(trainer, values)
        shown = {f"collapse/{name}": value for name, value in values.items()}
        pl_module.log_dict({**shown, "collapse/alarm": float(self.alarm)}, on_step=True, on_epoch=False, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self._in_a_row, "alarm": self.alarm}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._in_a_row, self.alarm = state_dict["in_a_row"], state_dict["alarm"]

    @torch.no_grad()
    def _measure(self, trainer: Trainer, pl_module: LightningModule, video: Tensor) -> dict[str, Tensor]:
        was_training = pl_module.training
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
        # the same on all processes: they must stop together
        return {name: trainer.strategy.reduce(value, reduce_op="mean") for name, value in values.items()}

    def _judge(self, trainer: Trainer, values: dict[str, Tensor]) -> None:
        std, rank, cosine = (float(values[name]) for name in ("target_std", "effective_rank", "cross_clip_cosine"))
        collapsed = std < self.min_std or rank < self.min_rank or cosine > self.max_cosine
        self._in_a_row = self._in_a_row + 1 if collapsed else 0
        if self._in_a_row < self.patience or self.alarm:
            return
        self.alarm = True
        warnings.warn(
            f"collapse at step {trainer.global_step}: between clips the predicted embeddings have a standard deviation "
            f"of {std:.3g} (alarm below {self.min_std}), an effective rank of {rank:.3g} (below {self.min_rank}), a "
            f"cosine of {cosine:.4g} (above {self.max_cosine}). A falling loss means nothing now. Raise the momentum, "
            "lower optimizer.lr, or use SIGReg.",
            stacklevel=2,
        )
        if self.stop:
            trainer.should_stop = True
