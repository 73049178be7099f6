"""Scores of predicted depth on a batch of clips, and the trivial prediction: the median depth map of training clips."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blueberry_video.evaluation.depth_metrics import (
    MIN_DISPARITY,
    aligned_depth,
    depth_accuracy,
    disparity_of,
    flicker,
    temporal_alignment_error,
)
from blueberry_video.evaluation.reference import seeded_generators

MAX_MAPS = 256  # training clips in the median map


@dataclass(frozen=True)
class DepthScores:
    """Protocol by which predicted maps are scored.

    Args:
        max_depth: ground truth above it, in meters, is ignored, and predictions are clamped to it, such as 80 for KITTI
            and 10 for NYU. ``None``: 1000 m for aligned predictions, no limit for metric ones.
        by_image: align each frame separately, instead of the clip with one scale and shift.
        occlusion_tolerance: of :func:`~blueberry_video.evaluation.depth_metrics.temporal_alignment_error`; ``None``
            counts all pixels, as published.

    Raises:
        ValueError: a limit that is not positive.
    """

    max_depth: float | None = None
    by_image: bool = False
    occlusion_tolerance: float | None = 0.05

    def __post_init__(self) -> None:
        for key, value in (("max_depth", self.max_depth), ("occlusion_tolerance", self.occlusion_tolerance)):
            if value is not None and not value > 0:
                raise ValueError(f"task.scores.{key}={value} must be above 0, or null.")

    def truth(self, batch: dict) -> Tensor:
        """Returns the depth (B, T, H, W) of a batch, 0 where it is invalid or above ``max_depth``."""
        depth = batch["depth"].float()
        return depth if self.max_depth is None else torch.where(depth <= self.max_depth, depth, 0.0)

    def depth(self, maps: Tensor, batch: dict, metric: bool) -> Tensor:
        """Returns predicted depth in meters: ``maps`` of a metric model, or disparity aligned to the ground truth."""
        if not metric:
            return aligned_depth(maps.float(), self.truth(batch), self.max_depth, self.by_image)
        return maps.float() if self.max_depth is None else maps.float().clamp(max=self.max_depth)

    def __call__(self, maps: Tensor, batch: dict, metric: bool) -> dict[str, Tensor]:
        """Scores of maps (B, T, H, W), disparity or with ``metric`` depth.

        Args:
            maps: predictions.
            batch: has ``depth`` (B, T, H, W) and, for ``tae``, ``intrinsics`` (B, 3, 3) and ``poses`` (B, T, 4, 4).

        Returns:
            Vectors with one value for each clip with valid depth: ``abs_rel``, ``delta1``, ``rmse`` and, for more than
            one frame, ``flicker``, ``tae`` and ``tae_floor``, in percent. Warns of maps that have one value everywhere.
        """
        if maps.numel() > 1 and bool(maps.amin() == maps.amax()):
            warnings.warn(
                f"the predicted maps of {len(maps)} clips have one value, {maps.amin().item():g}, at all pixels: the "
                "last activation of the model is saturated, and no gradient reaches its weights. Start from pretrained "
                "weights (init_from), or lower optimizer.lr or task.head_lr_scale.",
                stacklevel=2,
            )
        truth, depth = self.truth(batch), self.depth(maps, batch, metric)
        values = depth_accuracy(depth, truth)._asdict()
        if truth.shape[1] > 1:
            values["flicker"] = flicker(depth, truth)
            if {"intrinsics", "poses"} <= set(batch):
                cameras = (batch["intrinsics"], batch["poses"], self.occlusion_tolerance)
                values["tae"] = temporal_alignment_error(depth, truth, *cameras)
                values["tae_floor"] = temporal_alignment_error(truth, truth, *cameras)
        return {name: value[~value.isnan()] for name, value in values.items()}

    def controls(
        self,
        batch: dict,
        metric: bool,
        median: Tensor | None,
        predict: Callable[[Tensor], Tensor] | None,
        initial: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Scores of the controls, as vectors like those of the scores.

        Args:
            batch: has ``depth`` and ``video``.
            metric: whether ``predict`` returns depth.
            median: constant disparity (H, W); ``None`` leaves ``abs_rel_trivial`` out.
            predict: video model, (B, C, T, H, W) -> (B, T, H, W); ``None`` leaves ``abs_rel_shuffled`` and
                ``tae_shuffled`` out.
            initial: maps (B, T, H, W) of the model that training started from; ``None`` leaves ``abs_rel_initial``,
                ``delta1_initial``, ``tae_initial`` and ``flicker_initial`` out.
        """
        values = {}
        if initial is not None:
            found = self(initial, batch, metric)
            values = {f"{name}_initial": found[name] for name in found if name not in ("rmse", "tae_floor")}
        if median is not None:
            constant = median.to(batch["depth"]).expand_as(batch["depth"])
            trivial = 1 / constant.clamp(min=MIN_DISPARITY) if metric else constant
            values["abs_rel_trivial"] = self(trivial, batch, metric)["abs_rel"]
        if predict is not None and batch["depth"].shape[1] > 1:
            found = self(shuffled_prediction(predict, batch["video"], batch), batch, metric)
            values |= {f"{name}_shuffled": found[name] for name in ("abs_rel", "tae") if name in found}
        return values


def derived_scores(means: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores computed from the means of other scores over a set; those with missing terms are left out.

    Returns:
        ``abs_rel_share``, the ratio of ``abs_rel`` to ``abs_rel_trivial``; ``abs_rel_gain``, the decrease from the
        initial model; ``tae_excess``, ``tae`` without ``tae_floor``, and that of controls; ``tae_excess_share``, its
        ratio to that of the initial model.
    """
    values = {}
    if "abs_rel_trivial" in means:
        values["abs_rel_share"] = means["abs_rel"] / means["abs_rel_trivial"]
    if "abs_rel_initial" in means:
        values["abs_rel_gain"] = means["abs_rel_initial"] - means["abs_rel"]
    for suffix in ("", "_initial", "_shuffled"):
        if f"tae{suffix}" in means and "tae_floor" in means:
            values[f"tae_excess{suffix}"] = means[f"tae{suffix}"] - means["tae_floor"]
    if "tae_excess_initial" in values:
        values["tae_excess_share"] = values["tae_excess"] / values["tae_excess_initial"]
    return values


@torch.no_grad()
def shuffled_prediction(predict: Callable[[Tensor], Tensor], video: Tensor, batch: dict) -> Tensor:
    """Predicts clips with their frames in a random order, and returns the maps in the original order.

    A model that uses the order of frames loses by it; one that predicts frames separately does not. The order of a clip
    is a function of its id.

    Args:
        predict: (B, C, T, H, W) -> (B, T, H, W).
        video: (B, C, T, H, W).
        batch: has the ``id`` of each clip.
    """
    frames = video.shape[2]
    order = torch.stack([torch.randperm(frames, generator=each) for each in seeded_generators(batch)]).to(video.device)
    rows = torch.arange(len(video), device=video.device)[:, None]
    maps = predict(video.transpose(1, 2)[rows, order].transpose(1, 2))
    return maps[rows, order.argsort(dim=1)]


class MedianMap:
    """Median disparity map of up to 256 evenly spaced training clips, pixel by pixel: the best constant prediction.

    Each clip contributes its middle frame. The clips are read once, at the first use, on every process.
    """

    def __init__(self) -> None:
        self._maps: list[Tensor] | None = None
        self._medians: dict[tuple[int, ...], Tensor] = {}  # by size

    def get(self, task: Any, height: int, width: int) -> Tensor | None:
        """Returns the map (H, W) of disparity in 1/m, or of unknown scale if no clip has ``depth``; 0 for pixels
        without valid values.

        Args:
            task: LightningModule in a trainer with a datamodule.
            height, width: H and W in pixels, to which maps of other sizes are resized by the nearest pixel.

        Returns:
            The map; ``None`` without a trainer, or if the training clips have neither ``depth`` nor ``disparity``.
        """
        if self._maps is None:
            data = None if task._trainer is None else getattr(task.trainer, "datamodule", None)
            self._maps = [] if data is None else _middle_maps(data.train)
        size = (height, width)
        if not self._maps:
            return None
        if size not in self._medians:
            resized = [F.interpolate(each[None, None], size, mode="nearest-exact")[0, 0] for each in self._maps]
            self._medians[size] = torch.stack(resized).nanmedian(dim=0).values.nan_to_num(0.0)
        return self._medians[size]


def _middle_maps(dataset: Any) -> list[Tensor]:
    """Disparity maps (H, W) of evenly spaced clips, NaN where they are invalid."""
    size = len(dataset)
    count = min(size, MAX_MAPS)
    maps: dict[str, list[Tensor]] = {"depth": [], "disparity": []}  # of different scales, so that they are not mixed
    for index in range(count):
        clip = dataset[index * size // count]
        if "depth" in clip:
            disparity = disparity_of(clip["depth"][len(clip["depth"]) // 2].float())
            maps["depth"].append(torch.where(disparity > 0, disparity, torch.nan))
        elif "disparity" in clip:
            maps["disparity"].append(clip["disparity"][len(clip["disparity"]) // 2].float())
    return maps["depth"] or maps["disparity"]
