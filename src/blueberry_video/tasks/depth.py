"""Training of depth: relative or metric, of images or videos, from ground truth and from pseudo-labels."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from blueberry_video.evaluation.depth_metrics import disparity_of, valid_depth
from blueberry_video.evaluation.depth_scores import DepthScores, MedianMap, derived_scores
from blueberry_video.inference.depth_pictures import colored, range_of
from blueberry_video.optim import scaled_groups
from blueberry_video.tasks.base import Task
from blueberry_video.tasks.depth_losses import MetricLoss, RelativeLoss, captured
from blueberry_video.tasks.depth_student import Student, check_augment, flipped, is_video_model, predict_maps
from blueberry_video.tasks.settings import ClipInput, Optimization


class Depth(Task):
    """Trains a model of depth on clips with ``depth`` (ground truth), ``disparity`` (pseudo-labels), or neither: those
    get pseudo-labels of the teacher. An image model receives the frames of a clip separately.

    A model with ``max_depth`` learns metric depth with SiLog; others learn disparity with ``loss``. Logs ``loss`` and
    its terms; in validation, on clips with ``depth``, the metrics of
    :class:`~blueberry_video.evaluation.depth_scores.DepthScores`: ``abs_rel``, ``delta1``, ``rmse`` (m) and, for more
    than one frame, ``tae``, ``tae_floor`` and ``flicker`` (percent); ``abs_rel_trivial`` of the median map of training
    clips, aligned as predictions are; for video models ``…_shuffled``, with the frames of each clip in a random order,
    and ``…_initial`` of the model with the weights of ``init_from``; and the
    :func:`~blueberry_video.evaluation.depth_scores.derived_scores`. Clips without a valid pixel contribute nothing.

    Args:
        model: :class:`~blueberry_video.models.depth_anything.DepthAnything` or its video model.
        optimization, input: see :class:`~blueberry_video.tasks.base.Task`; ``input.augment`` must not move pixels.
        loss: weights of the losses of disparity.
        student: augmentation and weight of pseudo-labelled clips.
        teacher: frozen model that predicts the disparity of clips without labels; checkpoints do not contain it.
        teacher_from: its weights, a file, folder, hub id, or checkpoint of a run; ``None``: those it was built with.
        head_lr_scale: learning rate of the parameters outside the encoder relative to those of the encoder.
        temporal_lr_scale: learning rate of the temporal modules relative to the rest of the head.
        flip: probability of a horizontal flip of a training clip with its maps; 0.5 in Depth Anything.
        scores: protocol of validation; the default of its ``max_depth`` is that of the model.
        num_pictures: number of clips in :meth:`media`.

    Raises:
        ValueError: a model of a different kind, a teacher of a metric model, ``input.augment`` that moves pixels, or a
            setting out of range; in a step, clips without labels or of a kind that the model does not learn.
    """

    model: Any  # DepthAnything or VideoDepthAnything
    teacher: Any
    frozen: Any  # initial encoder, for the alignment of features
    initial: Any  # video model with the weights of init_from

    def __init__(
        self,
        model: nn.Module,
        optimization: Optimization,
        input: ClipInput | None = None,
        loss: RelativeLoss | None = None,
        student: Student | None = None,
        teacher: nn.Module | None = None,
        teacher_from: str | Path | None = None,
        head_lr_scale: float = 10.0,
        temporal_lr_scale: float = 1.0,
        flip: float = 0.0,
        scores: DepthScores | None = None,
        num_pictures: int = 4,
    ):
        super().__init__(model, optimization, input)
        if not hasattr(model, "pretrained"):
            raise ValueError(f"Depth requires model=depth_anything/…: model._target_={type(model).__name__}.")
        if not min(head_lr_scale, temporal_lr_scale) > 0 or not 0 <= flip <= 1:
            raise ValueError(
                f"task.head_lr_scale={head_lr_scale} and task.temporal_lr_scale={temporal_lr_scale} must be above 0, "
                f"and task.flip={flip} in [0, 1]."
            )
        self.loss, self.student = loss or RelativeLoss(), student or Student()
        check_augment("input", self.augment)
        check_augment("student", self.student.augment)
        if (limit := getattr(teacher, "max_depth", None)) is not None:
            raise ValueError(f"task.teacher.max_depth={limit} must be null: a teacher predicts disparity.")
        self.metric, self.is_video = getattr(model, "max_depth", None) is not None, is_video_model(model)
        self.objective = MetricLoss() if self.metric else self.loss
        if self.metric and (teacher is not None or self.loss.features):
            raise ValueError(
                f"model.max_depth={self.model.max_depth} trains metric depth, which uses neither task.teacher nor "
                "task.loss.features: set model.max_depth=null, or task.teacher=null and task.loss.features=0."
            )
        if self.loss.features and not any(each.requires_grad for each in self.model.pretrained.parameters()):
            raise ValueError(f"task.loss.features={self.loss.features} requires a trainable encoder: set it to 0.")
        # not registered as submodules, which would be trained, averaged, sharded and written to checkpoints
        self.__dict__ |= {"teacher": teacher and teacher.requires_grad_(False).eval(), "frozen": None, "initial": None}
        self.teacher_from, self.flip, self.scores = teacher_from, flip, scores or DepthScores()
        self.head_lr_scale, self.temporal_lr_scale, self.num_pictures = head_lr_scale, temporal_lr_scale, num_pictures
        if self.metric and self.scores.max_depth is None:
            self.scores = replace(self.scores, max_depth=float(self.model.max_depth))
        self._median = MedianMap()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.teacher is not None and self.teacher_from is not None:  # once: setup also runs for validation
            rank_zero_only(print)(f"teacher: {self.teacher.load_published(self.teacher_from)}")
            self.teacher_from = None
        if self.loss.features and self.frozen is None:
            self.__dict__["frozen"] = copy.deepcopy(self.model.pretrained).requires_grad_(False).eval()
        if stage == "fit" and self.is_video and self.optimization.init_from is not None:  # a resume loads it too
            self.__dict__["initial"] = copy.deepcopy(self.model).requires_grad_(False).eval()

    def predict(self, video: Tensor, model: nn.Module | None = None) -> Tensor:
        """Predicts maps (B, T, H, W) of clips (B, C, T, H, W) in [0, 1]."""
        return predict_maps(model or self.model, self.normalize(video))

    def shared_step(self, batch: dict, stage: str) -> dict[str, Tensor]:
        if stage == "train":
            return self._training_step(flipped(batch, self.flip))
        maps = self.predict(batch["video"])
        target, valid, _ = self._target(batch)
        kept = valid.flatten(1).any(1).nonzero().flatten().tolist()
        rows = [slice(clip, clip + 1) for clip in kept]  # the loss of a clip must not depend on its batch
        losses = [self.objective.total(self.objective.supervised(maps[i], target[i], valid[i])) for i in rows]
        values = {"loss": torch.stack(losses) if losses else maps.new_zeros(0)}
        if "depth" not in batch:
            return values
        median = self._median.get(self, maps.shape[-2], maps.shape[-1])
        initial = self.initial and self.predict(batch["video"], self.initial.to(batch["video"]))
        controls = self.scores.controls(batch, self.metric, median, self.predict if self.is_video else None, initial)
        return values | self.scores(maps, batch, self.metric) | controls

    def epoch_metrics(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        return derived_scores(means)

    @torch.no_grad()
    def media(self, batch: dict) -> dict[str, Tensor]:
        """``depth``: rows of frames, ground truth and aligned prediction, as disparity in one range per clip."""
        chosen = {key: value[: self.num_pictures] for key, value in batch.items() if isinstance(value, Tensor)}
        maps = self.predict(chosen["video"])
        if "depth" in chosen:
            maps = disparity_of(self.scores.depth(maps, chosen, self.metric))
        target, valid, _ = self._target(chosen)
        truth = torch.where(valid, disparity_of(target) if self.metric else target, torch.nan)
        limits = [range_of(truth), range_of(maps)]
        pair = [colored(truth, *limits[0]), colored(maps, *limits[0 if "depth" in chosen else 1])]
        return {"depth": self.panels([chosen["video"], *pair])}

    def tokens_per_clip(self, batch: dict) -> int:
        """Number of tokens of a clip, over all its repeats."""
        sides = (side // self.model.pretrained.patch_size[1] for side in batch["video"].shape[3:])
        return math.prod((batch["video"].shape[2], *sides)) * self._times(batch)

    def load_weights(self, path: str | Path) -> str:
        return self.model.load_published(path)

    def parameter_groups(self) -> list[dict]:
        """Parameter groups of the temporal modules, of the head and of the encoder, with their learning rates."""
        temporal = [each for name, each in self.model.named_parameters() if "motion_modules." in name]
        inside = {*temporal, *self.model.pretrained.parameters()}
        head = [each for each in self.parameters() if each not in inside]
        scales = ((head, self.head_lr_scale), (temporal, self.head_lr_scale * self.temporal_lr_scale))
        return scaled_groups(super().parameter_groups(), scales)

    def _target(self, batch: dict) -> tuple[Tensor, Tensor, bool]:
        """Returns the target (B, T, H, W), depth or disparity, its valid pixels, and whether it is a pseudo-label."""
        if "depth" in batch:
            depth = batch["depth"].float()
            valid = valid_depth(depth) & (depth <= (self.model.max_depth if self.metric else math.inf))
            return depth if self.metric else disparity_of(depth), valid, False
        if self.metric:
            raise ValueError(
                f"model.max_depth={self.model.max_depth} requires clips with depth, but they have {', '.join(batch)}: "
                "use data with depth, or set model.max_depth=null."
            )
        if "disparity" in batch:
            disparity = batch["disparity"].float()
        elif self.teacher is not None:
            with torch.no_grad():
                disparity = self.predict(batch["video"], self.teacher.to(batch["video"]))
        else:
            raise ValueError(
                f"clips with {', '.join(batch)} have neither depth nor disparity, and task.teacher=null: use data with "
                "one of these (data=world_depth), or set a teacher."
            )
        valid = disparity.isfinite()
        return torch.where(valid, disparity, 0.0), valid, True

    def _training_step(self, batch: dict) -> dict[str, Tensor]:
        target, valid, pseudo = self._target(batch)
        if not pseudo:
            terms = self.objective.supervised(self.predict(batch["video"]), target, valid)
            return {"loss": self.objective.total(terms), **terms}
        view = self.student.view(batch["video"], target, valid)
        with captured(self.model.pretrained.norm) as outputs:
            terms = self.loss.pseudo(self.predict(view.video), view)
        if self.frozen is not None:
            images = self.normalize(view.video).transpose(1, 2).flatten(0, 1)[:, :, None]
            terms["features"] = self.loss.alignment(outputs[-1], self.frozen.to(images), images, self.model.taps[-1])
        return {"loss": self.student.weight * self.loss.total(terms), **terms}
