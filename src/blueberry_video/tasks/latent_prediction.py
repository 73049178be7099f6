"""Latent prediction: predicts a target encoder's embeddings of masked tokens (V-JEPA, arXiv 2404.08471; V-JEPA 2,
2506.09985; 2.1, 2603.14482; LeJEPA, 2511.08544; SALT, 2509.24317).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer

from blueberry_video.evaluation.reference import ReferenceClips, clip_seeds
from blueberry_video.evaluation.trivial import trivial_latent_losses
from blueberry_video.inference.embedding_pictures import latent_pictures
from blueberry_video.masking import Masks, evaluation_masks
from blueberry_video.models.encoder import Encoder
from blueberry_video.models.jepa.losses import context_weight, latent_loss, sigreg
from blueberry_video.models.jepa.model import JEPA
from blueberry_video.models.jepa.multi_level import normalize_levels
from blueberry_video.nn.patches import gather_tokens
from blueberry_video.tasks.base import Task
from blueberry_video.tasks.latent_checks import check_settings, clip_each, mask_index
from blueberry_video.tasks.settings import ClipInput, Optimization
from blueberry_video.weights.files import read_weights


class LatentPrediction(Task):
    """Trains an encoder and a predictor of embeddings.

    Targets are embeddings of the whole clip after a LayerNorm without affine parameters. The target encoder is

    - with ``model.ema=true`` and ``momentum``, an exponential moving average of the encoder (V-JEPA);
    - with ``model.teacher`` and ``teacher_from``, a frozen trained encoder (SALT);
    - otherwise the encoder itself, with gradients. This collapses, unless ``sigreg_weight`` regularizes the embeddings
      at each position to be normally distributed over the batch (LeJEPA).

    Logs ``loss``, ``loss_prediction`` and, if they are part of it, ``loss_context`` and ``loss_sigreg``; in validation
    also the baselines ``loss_prediction_trivial_mean``, ``…_position``, ``…_clip``, their minimum
    ``loss_prediction_trivial``, and the ratio ``loss_share`` = ``loss_prediction`` / ``loss_prediction_trivial``. The
    losses do not measure the quality of the encoder: targets change, and on collapse every loss is 0. In validation,
    the masks of a clip depend only on its id, and the baselines' means and ``loss_sigreg``, a statistic over clips, are
    those of :class:`~blueberry_video.evaluation.reference.ReferenceClips`.

    Args:
        model, optimization, input: see :class:`~blueberry_video.tasks.base.Task`.
        maskings: each a ``(batch_size, grid, generator) -> Masks``; the loss is their mean.
        momentum: ``(step, total_steps) ->`` EMA momentum of the target encoder in [0, 1].
        weight_decay: ``(step, total_steps) ->`` value above 0, replaces the weight decay of the optimizer where that is
            not 0.
        teacher_from: file of the target encoder's weights, published or of a run.
        visible_weight: weight of the loss on visible tokens; 0.5 in V-JEPA 2.1. Tokens near masked ones weigh more, see
            :func:`~blueberry_video.models.jepa.losses.context_weight`.
        sigreg_weight: share of :func:`~blueberry_video.models.jepa.losses.sigreg` in the loss, in [0, 1).
        sigreg_directions: number of its random projections per step.
        clip_after: share of the run without ``trainer.gradient_clip_val``: V-JEPA clips after its warm-up.
        clip_separately: clip the gradients of encoder and predictor to separate norms, as V-JEPA.
        loss_exponent: of :func:`~blueberry_video.models.jepa.losses.latent_loss`.
        mask_token: selection of the mask token by ``"clip_length"``, the index of the number of frames in
            ``clip_lengths`` (V-JEPA 2: with one length, all maskings share token 0), or by ``"masking"`` (V-JEPA).
        clip_lengths: numbers of frames of the clips, in the order of their mask tokens; ``None``: of the encoder.
        num_pictures: number of clips in :meth:`media`.

    Raises:
        ValueError: for arguments out of range or in contradiction about the target encoder; when training begins, if
            ``teacher_from`` does not contain the weights of the target encoder.
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
        clip_separately: bool = False,
        loss_exponent: float = 1.0,
        mask_token: str = "clip_length",
        clip_lengths: Sequence[int] | None = None,
        num_pictures: int = 6,
    ):
        super().__init__(model, optimization, input)
        self.maskings, self.num_pictures = list(maskings), num_pictures
        self.momentum, self.weight_decay, self.teacher_from = momentum, weight_decay, teacher_from
        self.clip_after, self.clip_separately, self.loss_exponent = clip_after, clip_separately, loss_exponent
        self.visible_weight, self.mask_token, self.clip_lengths = visible_weight, mask_token, clip_lengths
        self.sigreg_weight, self.sigreg_directions = sigreg_weight, sigreg_directions
        self._reference_clips = ReferenceClips()
        self._references: dict[int, Tensor] = {}  # of the running evaluation: embeddings (K, N, D) by N
        check_settings(self)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.teacher_from is not None and stage == "fit":
            report = cast(Encoder, self.model.target_encoder).load_published(self.teacher_from)
            rank_zero_only(print)(f"target encoder: {report}")

    def load_weights(self, path: str | Path) -> str:
        """Loads the whole model if the file contains it, as for a cool-down on longer clips, otherwise the encoder."""
        own, found = self.model.state_dict(), read_weights(path)
        if own.keys() <= found.keys():
            self.model.load_state_dict({name: found[name] for name in own})
            return f"loaded {len(own)} tensors, predictor and target encoder included, from {path}"
        report = super().load_weights(path)
        if self.momentum is not None:
            self.model.update_target(0.0)
        return report

    def latents(self, video: Tensor) -> Tensor:
        """Prediction targets (B, N, D) of a video (B, C, T, H, W) in [0, 1]."""
        latents = self.model.targets(self.normalize(video), gradient=self.model.target_encoder is None)
        return normalize_levels(latents, (self.model.target_encoder or self.model.encoder).levels)

    def shared_step(self, batch: dict, stage: str) -> dict[str, Tensor]:
        latents = self.latents(batch["video"])
        if stage != "train" and not self._references:
            found = self._reference_clips.measure(self, stage, lambda clip: self.latents(clip["video"]))
            self._references = {shape[0]: embeddings for shape, embeddings in found.items()}
        by_masking = [self._losses(batch, latents, number, stage) for number in range(len(self.maskings))]
        values = {name: torch.stack([losses[name] for losses in by_masking]).mean() for name in by_masking[0]}
        loss = values["loss_prediction"] + self.visible_weight * values.get("loss_context", 0.0)
        if self.sigreg_weight:
            size, generator = (latents.shape[-1], self.sigreg_directions), torch.Generator().manual_seed(0)
            directions = torch.randn(size, generator=None if stage == "train" else generator).to(latents)
            clips = latents if stage == "train" else self._references.get(latents.shape[1], latents)
            values["loss_sigreg"] = sigreg(clips.transpose(0, 1), directions)
            loss = (1 - self.sigreg_weight) * loss + self.sigreg_weight * values["loss_sigreg"]
        return {"loss": loss, **values}

    def _losses(self, batch: dict, latents: Tensor, number: int, stage: str) -> dict[str, Tensor]:
        """Losses of one masking, by name."""
        encoder, exponent, inputs = self.model.encoder, self.loss_exponent, self.normalize(batch["video"])
        grid = encoder.grid(inputs.shape)
        keep, target, _ = self._masks(number, batch, grid, stage).to(latents.device)
        index = mask_index(self, number, inputs.shape[2])
        hidden, visible = self.model.predictor.both(encoder(inputs, keep), keep, target, index, grid)
        values = {"loss_prediction": latent_loss(hidden, gather_tokens(latents, target), exponent=exponent)}
        if visible is not None:
            truth, weight = gather_tokens(latents, keep), context_weight(keep, target, grid)
            values["loss_context"] = latent_loss(visible, truth, weight, exponent)
        if stage == "train":
            return values
        mean = None if (found := self._references.get(latents.shape[1])) is None else found.mean(dim=0)
        trivial = trivial_latent_losses(latents, keep, target, mean, exponent)
        return values | {f"loss_prediction_trivial_{name}": value for name, value in trivial.items()}

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._references = {}

    on_test_epoch_start = on_validation_epoch_start

    def epoch_metrics(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        trivial = min(means[f"loss_prediction_trivial_{name}"] for name in ("mean", "position", "clip"))
        return {"loss_prediction_trivial": trivial, "loss_share": means["loss_prediction"] / trivial}

    @property
    def total_steps(self) -> int:
        return int(self.trainer.estimated_stepping_batches)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Sets the scheduled weight decay, steps, and updates the target encoder."""
        step = self.trainer.global_step
        if self.weight_decay is not None:
            for group in self.trainer.optimizers[0].param_groups:
                group["weight_decay"] = self.weight_decay(step, self.total_steps) if group["weight_decay"] else 0.0
        super().optimizer_step(*arguments, **options)
        if self.momentum is not None:
            self.model.update_target(self.momentum(step, self.total_steps))

    def configure_gradient_clipping(self, optimizer: Optimizer, *how: Any, **options: Any) -> None:
        if self.trainer.global_step >= self.clip_after * self.total_steps:
            if self.clip_separately:
                clip_each((self.model.encoder, self.model.predictor), *how, **options)
            else:
                super().configure_gradient_clipping(optimizer, *how, **options)

    def media(self, batch: dict) -> dict[str, Tensor]:
        """``latents``: one row per clip: clip, visible tokens, targets, predictions of masked tokens."""
        video, model = batch["video"][: self.num_pictures], self.model
        keep, target, _ = self._masks(0, batch, model.encoder.grid(video.shape), "val").to(video.device)
        keep, target = keep[: len(video)], target[: len(video)]
        index = mask_index(self, 0, video.shape[2])
        shown = latent_pictures(model, video, self.normalize(video), self.latents(video), keep, target, index)
        return {"latents": self.panels(shown)}

    def _masks(self, number: int, batch: dict, grid: tuple[int, int, int], stage: str) -> Masks:
        if stage == "train":
            return self.maskings[number](len(batch["video"]), grid)
        return evaluation_masks(self.maskings[number], clip_seeds(batch), grid, number)
