"""Prediction of the normalized pixels of masked patches (VideoMAE, arXiv 2203.12602; VideoMAE V2, 2303.16727; OmniMAE,
2206.08356).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from blueberry_video.evaluation.reference import clip_seeds
from blueberry_video.evaluation.trivial import trivial_patch_losses
from blueberry_video.inference.reconstruction import hide, reconstruct
from blueberry_video.masking import Masks, evaluation_masks
from blueberry_video.models.masked_autoencoder.model import MaskedAutoencoder, decoder_flops
from blueberry_video.nn.patches import gather_tokens, normalize_patches, patchify, token_mse
from blueberry_video.tasks.base import Task
from blueberry_video.tasks.settings import ClipInput, Optimization


def patch_targets(
    video: Tensor, patch_size: tuple[int, int, int], eps_under_root: bool = False, over: str = "channel"
) -> Tensor:
    """Patches of a video (B, C, T, H, W) in [0, 1], normalized, with channels last: (B, N, P * C)."""
    patches = patchify(video, patch_size)
    return normalize_patches(patches, eps_under_root=eps_under_root, over=over).patches.flatten(2)


def masked_pixel_loss(
    predicted: Tensor,
    video: Tensor,
    target: Tensor,
    patch_size: tuple[int, int, int],
    scored: Tensor | None = None,
    eps_under_root: bool = False,
    by_clip: bool = False,
    over: str = "channel",
) -> Tensor:
    """Mean squared error over the predicted patches.

    Args:
        predicted: (B, N_target, P * C).
        video: (B, C, T, H, W) in [0, 1].
        target: (B, N_target) indices of the predicted patches.
        patch_size: (t, h, w).
        scored: (B, N_target) bool, True for patches that count; ``None``: all.
        eps_under_root, over: see :func:`~blueberry_video.nn.patches.normalize_patches`.
        by_clip: see :func:`~blueberry_video.nn.patches.token_mse`.

    Returns:
        A scalar; about 1 for a prediction of zeros, less if patches are constant, as on plain backgrounds.
    """
    truth = gather_tokens(patch_targets(video, patch_size, eps_under_root, over), target)
    return token_mse(predicted.to(torch.promote_types(predicted.dtype, torch.float32)), truth, scored, by_clip)


class MaskedPixels(Task):
    """Trains a masked autoencoder.

    Logs ``loss`` and, in validation, the baselines ``loss_trivial_zero``, ``loss_trivial_mean``,
    ``loss_trivial_nearest``, their minimum ``loss_trivial``, and the ratio ``loss_share`` = ``loss`` /
    ``loss_trivial``; for batches of single frames, all with the suffix ``_image``. In validation, the mask of a clip
    depends only on its id. Also logs ``decoder_mflops``, the decoder's FLOPs per clip in the forward pass, and
    ``decoder_mflops_full``, those of predicting all masked tokens.

    Args:
        model, optimization, input: see :class:`~blueberry_video.tasks.base.Task`.
        masking: ``(batch_size, grid, generator) -> Masks``, one of :mod:`blueberry_video.masking`.
        eps_under_root: normalize targets as OmniMAE rather than as VideoMAE, see
            :func:`~blueberry_video.nn.patches.normalize_patches`.
        normalize_over: its ``over``: ``"channel"``, as published, ``"patch"`` or ``"none"``.
        num_pictures: number of clips in :meth:`media`.
    """

    trains = MaskedAutoencoder
    model: MaskedAutoencoder

    def __init__(
        self,
        model: MaskedAutoencoder,
        optimization: Optimization,
        masking: Callable[..., Masks],
        input: ClipInput | None = None,
        eps_under_root: bool = False,
        normalize_over: str = "channel",
        num_pictures: int = 6,
    ):
        super().__init__(model, optimization, input)
        self.masking = masking
        if normalize_over not in ("channel", "patch", "none"):
            raise ValueError(f"task.normalize_over={normalize_over!r} is unknown: choose 'channel', 'patch' or 'none'.")
        self.eps_under_root, self.normalize_over = eps_under_root, normalize_over
        self.num_pictures = num_pictures
        self._decoder_mflops: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self._decoder_mflops:  # setup also runs for validation, with weights that a strategy has sharded
            return
        grid = self.model.encoder.grid(self.model.encoder.video_size)
        masks = evaluation_masks(self.masking, [0], grid)
        visible, tokens = masks.keep.shape[1], self.model.encoder.num_tokens
        for name, targets in (("", masks.target.shape[1]), ("_full", tokens - visible)):
            mflops = decoder_flops(self.model, visible, targets) / 1e6
            self._decoder_mflops[f"decoder_mflops{name}"] = torch.tensor(mflops)

    def shared_step(self, batch: dict, stage: str) -> dict[str, Tensor]:
        video, encoder = batch["video"], self.model.encoder
        clip, grid = encoder.as_clip(video), encoder.grid(video.shape)
        training = stage == "train"
        masks = self.masking(len(video), grid) if training else self._validation_masks(batch, grid)
        keep, target, scored = masks.to(video.device)
        predicted = self.model(self.normalize(video), keep, target)
        options = encoder.patch_size, scored, self.eps_under_root, not training, self.normalize_over
        values = {"loss": masked_pixel_loss(predicted, clip, target, *options)}
        if training:
            return values
        patches = patch_targets(clip, encoder.patch_size, self.eps_under_root, self.normalize_over)
        trivial = trivial_patch_losses(patches, keep, target, grid, scored, by_clip=True)
        values |= {f"loss_trivial_{name}": value for name, value in trivial.items()}
        suffix = "_image" if encoder.images and video.shape[2] == 1 else ""
        return {f"{name}{suffix}": value for name, value in values.items()}

    def epoch_metrics(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        values = dict(self._decoder_mflops)
        for suffix in ("", "_image"):
            if f"loss{suffix}" in means:
                trivial = min(means[f"loss_trivial_{name}{suffix}"] for name in ("zero", "mean", "nearest"))
                values |= {f"loss_trivial{suffix}": trivial, f"loss_share{suffix}": means[f"loss{suffix}"] / trivial}
        return values

    def media(self, batch: dict) -> dict[str, Tensor]:
        """``reconstruction``: one row per clip: the clip, its visible patches, and the reconstruction."""
        video, encoder = batch["video"][: self.num_pictures], self.model.encoder
        keep, target, _ = self._validation_masks(batch, encoder.grid(video.shape)).to(video.device)
        keep, target = keep[: len(video)], target[: len(video)]
        seen = hide(encoder, video, keep)
        filled = reconstruct(self.model, video, self.normalize(video), keep, target, self.normalize_over)
        return {"reconstruction": self.panels([video, seen, filled])}

    def _validation_masks(self, batch: dict, grid: tuple[int, int, int]) -> Masks:
        return evaluation_masks(self.masking, clip_seeds(batch), grid)
