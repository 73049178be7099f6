"""Masked-pixel prediction: hide most patches, predict their normalised pixels (VideoMAE, arXiv 2203.12602)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from blueberry_video.evaluation.trivial import trivial_patch_losses
from blueberry_video.inference.reconstruction import hide, reconstruct
from blueberry_video.masking import Masks
from blueberry_video.models.masked_autoencoder import MaskedAutoencoder
from blueberry_video.nn.patches import gather_tokens, normalize_patches, patchify
from blueberry_video.tasks.base import IMAGENET_MEAN, IMAGENET_STD, Task


def patch_targets(video: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """What the decoder must predict: each patch normalised per channel, the channel running fastest.

    (B, C, T, H, W) in [0, 1] -> (B, N, P * C).
    """
    return normalize_patches(patchify(video, patch_size)).patches.flatten(2)


def masked_pixel_loss(predicted: Tensor, video: Tensor, target: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Mean squared error on the hidden patches alone.

    Args:
        predicted: (B, N_target, P * C).
        video: (B, C, T, H, W) in [0, 1].
        target: (B, N_target) indices of the hidden patches.
        patch_size: (t, h, w).

    Returns:
        A scalar; predicting zero everywhere gets about 1 where no patch is constant, less on plain backgrounds.
    """
    truth = gather_tokens(patch_targets(video, patch_size), target)
    return F.mse_loss(predicted.float(), truth)


class MaskedPixels(Task):
    """Trains a masked autoencoder.

    Logs ``loss`` and, in validation, ``loss_trivial_zero``, ``loss_trivial_mean``, ``loss_trivial_nearest``, their
    minimum ``loss_trivial`` and the share of it that remains, ``loss_share``. Validation masks are the same in every
    epoch and run.

    Args:
        model, optimizer, schedule, augment, mean, std, lr_batch_size: see :class:`~blueberry_video.tasks.base.Task`.
        masking: ``(batch_size, grid, generator) -> Masks``, one of :mod:`blueberry_video.masking`.
        num_pictures: clips shown in :meth:`media`.
    """

    trains = MaskedAutoencoder
    model: MaskedAutoencoder

    def __init__(
        self,
        model: MaskedAutoencoder,
        optimizer: Callable[[list[dict]], Optimizer],
        schedule: Callable[[int, int], float],
        masking: Callable[..., Masks],
        augment: nn.Module | None = None,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        lr_batch_size: int | None = None,
        num_pictures: int = 6,
    ):
        super().__init__(model, optimizer, schedule, augment, mean, std, lr_batch_size)
        self.masking = masking
        self.num_pictures = num_pictures

    def shared_step(self, batch: dict, stage: str) -> dict[str, Tensor]:
        video = batch["video"]
        grid, patch_size = self.model.encoder.grid(video.shape), self.model.encoder.patch_size
        generator = None if stage == "train" else torch.Generator().manual_seed(0)
        masks = self.masking(len(video), grid, generator).to(video.device)
        predicted = self.model(self.normalize(video), masks.keep, masks.target)
        values = {"loss": masked_pixel_loss(predicted, video, masks.target, patch_size)}
        if stage != "train":
            trivial = trivial_patch_losses(patch_targets(video, patch_size), masks.keep, masks.target, grid)
            values |= {f"loss_trivial_{name}": value for name, value in trivial.items()}
        return values

    def on_validation_epoch_end(self) -> None:
        logged = self.trainer.callback_metrics
        trivial = min(value for name, value in logged.items() if name.startswith("val/loss_trivial_"))
        self.log_dict({"val/loss_trivial": trivial, "val/loss_share": logged["val/loss"] / trivial}, sync_dist=True)

    def media(self, batch: dict) -> dict[str, Tensor]:
        """``reconstruction``: a row a clip: the clip, what the model sees of it, what it makes of the rest."""
        video = batch["video"][: self.num_pictures]
        encoder = self.model.encoder
        masks = self.masking(len(video), encoder.grid(video.shape), torch.Generator().manual_seed(0)).to(video.device)
        seen = hide(video, masks.target, encoder.grid(video.shape), encoder.patch_size)
        filled = reconstruct(self.model, video, self.normalize(video), masks.keep, masks.target)
        return {"reconstruction": self.panels([video, seen, filled])}
