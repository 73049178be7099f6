"""Latent prediction: hide parts of a clip, predict the embeddings that another encoder gives them (V-JEPA, 2404.08471;
V-JEPA 2, 2506.09985; 2.1, 2603.14482; LeJEPA, 2511.08544; SALT, 2509.24317; all of arXiv)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer

from blueberry_video.evaluation.trivial import trivial_latent_losses
from blueberry_video.inference.embedding_pictures import latent_pictures
from blueberry_video.masking import Masks
from blueberry_video.models.encoder import Encoder
from blueberry_video.models.jepa.losses import context_weight, latent_loss, sigreg
from blueberry_video.models.jepa.model import JEPA
from blueberry_video.models.jepa.multi_level import normalize_levels
from blueberry_video.nn.patches import gather_tokens
from blueberry_video.tasks.base import Task
from blueberry_video.tasks.settings import ClipInput, Optimization
from blueberry_video.weights.files import read_weights


class LatentPrediction(Task):
    """Trains an encoder and a predictor of embeddings.

    The targets are the layer-normalised embeddings, without affine part, of the whole clip; whose, depends:

    - ``model.ema=true`` and a ``momentum``: an average of the encoder, without gradient (V-JEPA);
    - ``model.teacher`` and ``teacher_from``: a trained encoder that stays as it is (SALT);
    - neither: the encoder's own, with gradient. That collapses, unless ``sigreg_weight`` keeps the embeddings at every
      place normally distributed over the batch (LeJEPA).

    Logs ``loss``, ``loss_prediction`` and, where they are part of it, ``loss_context`` and ``loss_sigreg``; in
    validation also ``loss_prediction_trivial_mean``, ``…_place``, ``…_clip``, their minimum ``loss_prediction_trivial``
    and the share of it that the prediction leaves, ``loss_share``. No loss tells how good the encoder is: targets move,
    and where they collapse every loss is 0. Validation masks are the same in every epoch and run.

    Args:
        model, optimization, input: see :class:`~blueberry_video.tasks.base.Task`.
        maskings: each a ``(batch_size, grid, generator) -> Masks``; a step takes all of them, the loss is their mean,
            and the predictor has a mask token for each.
        momentum: ``(step, total_steps) ->`` weight of the old target encoder in [0, 1] after each optimiser step.
        weight_decay: ``(step, total_steps) ->`` value above 0, in place of the optimiser's, where that is not 0.
        teacher_from: file of the target encoder's weights, published or of an own run.
        visible_weight: of the loss on visible tokens; 0.5 in V-JEPA 2.1, which counts those near hidden ones more: see
            :func:`~blueberry_video.models.jepa.losses.context_weight`.
        sigreg_weight: share of :func:`~blueberry_video.models.jepa.losses.sigreg` in the loss, in [0, 1).
        sigreg_directions: projections a step that it looks at.
        clip_after: share of the run without ``trainer.gradient_clip_val``: V-JEPA clips after its warm-up.
        num_pictures: clips shown in :meth:`media`.

    Raises:
        ValueError: for arguments out of range, or that fit no target encoder; when training begins, if ``teacher_from``
            does not hold the target encoder's weights.
    """

    trains = JEPA
    model: JEPA

    def __init__(
        self,
        model: JEPA,
        optimization: Optimization,
        maskings: list[Callable[..., Masks]],
        momentum: Callable[[int, int], float] | None = None,
        weight_decay: Callable[[int, int], float] | None = None,
        teacher_from: str | Path | None = None,
        input: ClipInput | None = None,
        visible_weight: float = 0.0,
        sigreg_weight: float = 0.0,
        sigreg_directions: int = 256,
        clip_after: float = 0.0,
        num_pictures: int = 6,
    ):
        super().__init__(model, optimization, input)
        self.maskings, self.num_pictures = list(maskings), num_pictures
        self.momentum, self.weight_decay, self.teacher_from = momentum, weight_decay, teacher_from
        self.visible_weight, self.clip_after = visible_weight, clip_after
        self.sigreg_weight, self.sigreg_directions = sigreg_weight, sigreg_directions
        self._check()

    def _check(self) -> None:
        if not self.maskings:
            raise ValueError("task.maskings is empty: list one masking at least; V-JEPA takes short and long blocks.")
        if not 0 <= self.sigreg_weight < 1 or self.visible_weight < 0 or not 0 <= self.clip_after <= 1:
            raise ValueError(
                f"task.sigreg_weight={self.sigreg_weight} must be in [0, 1), task.visible_weight={self.visible_weight} "
                f"at least 0 and task.clip_after={self.clip_after} in [0, 1]."
            )
        if bool(self.visible_weight) != (self.model.predictor.proj_context is not None):
            raise ValueError(f"task.visible_weight={self.visible_weight} needs model.predictor_context, 0 forbids it.")
        has_teacher = self.model.target_encoder is not None and not self.model.follows
        if (self.momentum is not None, self.teacher_from is not None) != (self.model.follows, has_teacher):
            raise ValueError(
                "the target encoder must be told one way: model.ema=true with task.momentum; model.teacher with "
                "task.teacher_from; or neither of the four. "
                f"Here model.ema={str(self.model.follows).lower()}, model.teacher is {'' if has_teacher else 'not '}"
                f"given, task.momentum={self.momentum} and task.teacher_from={self.teacher_from}."
            )
        for step in (0, 999):
            if self.momentum is not None and not 0 <= (value := self.momentum(step, 1000)) <= 1:
                raise ValueError(f"task.momentum comes to {value}: it is a weight in [0, 1], such as 0.998.")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.teacher_from is not None and stage == "fit":
            said = cast(Encoder, self.model.target_encoder).load_published(self.teacher_from)
            rank_zero_only(print)(f"target encoder: {said}")

    def load_weights(self, path: str | Path) -> str:
        """The whole model where the file has it, as a cool-down on longer clips needs; else the encoder, for both."""
        own, found = self.model.state_dict(), read_weights(path)
        if own.keys() <= found.keys():
            self.model.load_state_dict({name: found[name] for name in own})
            return f"loaded {len(own)} tensors, predictor and target encoder included, from {path}"
        said = super().load_weights(path)
        if self.momentum is not None:
            self.model.update_target(0.0)
        return said

    def latents(self, video: Tensor) -> Tensor:
        """What is to be predicted, of a video (B, C, T, H, W) in [0, 1]: (B, N, D)."""
        latents = self.model.targets(self.normalize(video), gradient=self.model.target_encoder is None)
        return normalize_levels(latents, (self.model.target_encoder or self.model.encoder).levels)

    def shared_step(self, batch: dict, stage: str) -> dict[str, Tensor]:
        video, latents = batch["video"], self.latents(batch["video"])
        found = [self._losses(video, latents, number, stage) for number in range(len(self.maskings))]
        values = {name: torch.stack([losses[name] for losses in found]).mean() for name in found[0]}
        loss = values["loss_prediction"] + self.visible_weight * values.get("loss_context", 0.0)
        if self.sigreg_weight:
            size = latents.shape[-1], self.sigreg_directions
            directions = torch.randn(size, generator=_generator(stage, 0)).to(latents)
            values["loss_sigreg"] = sigreg(latents.transpose(0, 1), directions)
            loss = (1 - self.sigreg_weight) * loss + self.sigreg_weight * values["loss_sigreg"]
        return {"loss": loss, **values}

    def _losses(self, video: Tensor, latents: Tensor, number: int, stage: str) -> dict[str, Tensor]:
        """Of one mask, by name."""
        inputs, grid = self.normalize(video), self.model.encoder.grid(video.shape)
        keep, target, _ = self._masks(number, len(video), grid, stage).to(video.device)
        hidden, visible = self.model.predictor.both(self.model.encoder(inputs, keep), keep, target, number, grid)
        values = {"loss_prediction": latent_loss(hidden, gather_tokens(latents, target))}
        if visible is not None:
            truth, weight = gather_tokens(latents, keep), context_weight(keep, target, grid)
            values["loss_context"] = latent_loss(visible, truth, weight)
        if stage == "train":
            return values
        trivial = trivial_latent_losses(latents, keep, target).items()
        return values | {f"loss_prediction_trivial_{name}": value for name, value in trivial}

    def on_validation_epoch_end(self) -> None:
        logged = self.trainer.callback_metrics
        trivial = min(logged[f"val/loss_prediction_trivial_{name}"] for name in ("mean", "place", "clip"))
        self.log("val/loss_prediction_trivial", trivial)
        self.log("val/loss_share", logged["val/loss_prediction"] / trivial)

    @property
    def total_steps(self) -> int:
        return int(self.trainer.estimated_stepping_batches)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """A step with its weight decay; after it the target encoder follows."""
        step = self.trainer.global_step
        if self.weight_decay is not None:
            for group in self.trainer.optimizers[0].param_groups:
                group["weight_decay"] = self.weight_decay(step, self.total_steps) if group["weight_decay"] else 0.0
        super().optimizer_step(*arguments, **options)
        if self.momentum is not None:
            self.model.update_target(self.momentum(step, self.total_steps))

    def configure_gradient_clipping(self, optimizer: Optimizer, *how: Any, **options: Any) -> None:
        if self.trainer.global_step >= self.clip_after * self.total_steps:
            super().configure_gradient_clipping(optimizer, *how, **options)

    def media(self, batch: dict) -> dict[str, Tensor]:
        """``latents``: a row a clip: the clip, what the encoder sees, targets, predictions of what it does not see."""
        video, model = batch["video"][: self.num_pictures], self.model
        keep, target, _ = self._masks(0, len(video), model.encoder.grid(video.shape), "val").to(video.device)
        shown = latent_pictures(model, video, self.normalize(video), self.latents(video), keep, target)
        return {"latents": self.panels(shown)}

    def _masks(self, number: int, batch_size: int, grid: tuple[int, int, int], stage: str) -> Masks:
        return self.maskings[number](batch_size, grid, _generator(stage, number))


def _generator(stage: str, seed: int) -> torch.Generator | None:
    """In validation always the same numbers."""
    return None if stage == "train" else torch.Generator().manual_seed(seed)
