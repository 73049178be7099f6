"""Videos of the predictions of a masked autoencoder."""

import torch
from torch import Tensor

from blueberry_video.models.encoder import Encoder
from blueberry_video.models.masked_autoencoder.model import MaskedAutoencoder
from blueberry_video.nn.patches import normalize_patches, patchify, unpatchify


@torch.no_grad()
def reconstruct(
    model: MaskedAutoencoder, video: Tensor, inputs: Tensor, keep: Tensor, target: Tensor, over: str = "channel"
) -> Tensor:
    """Replaces the target patches of a video with the predictions of a model; visible patches are unchanged.

    The model predicts patches of zero mean and unit variance. They are scaled to the **true** mean and standard
    deviation of each patch, so the result shows predicted texture and edges, not predicted colors. The small constant
    in the normalization of the targets is ignored, without a visible effect.

    Args:
        model: the autoencoder.
        video: (B, C, T, H, W) in [0, 1].
        inputs: the same video, normalized as the encoder requires.
        keep: (B, N_visible) indices of the visible tokens.
        target: (B, N_target) indices of the predicted tokens.
        over: normalization of the targets, see :func:`~blueberry_video.nn.patches.normalize_patches`.

    Returns:
        (B, C, T, H, W) in [0, 1]; patches that are neither visible nor predicted are black.
    """
    encoder = model.encoder
    patches = patchify(encoder.as_clip(video), encoder.patch_size)  # (B, N, P, C)
    _, mean, std = normalize_patches(patches, over=over)
    predicted = model(inputs, keep, target).float().view(*target.shape, *patches.shape[2:])
    rows = torch.arange(len(video), device=video.device)[:, None]
    filled = torch.zeros_like(patches)
    filled[rows, target] = (predicted * std[rows, target] + mean[rows, target]).to(filled.dtype)
    filled[rows, keep] = patches[rows, keep]
    return _as_video(encoder, filled, video).clamp(0, 1)


def hide(encoder: Encoder, video: Tensor, keep: Tensor) -> Tensor:
    """Blackens the patches of a video (B, C, T, H, W) that are not in ``keep`` (B, N_visible)."""
    patches = patchify(encoder.as_clip(video), encoder.patch_size)
    rows = torch.arange(len(video), device=video.device)[:, None]
    visible = torch.zeros_like(patches)
    visible[rows, keep] = patches[rows, keep]
    return _as_video(encoder, visible, video)


def _as_video(encoder: Encoder, patches: Tensor, like: Tensor) -> Tensor:
    """Converts patches (B, N, P, C) to a video of the shape of ``like``; a single frame has been repeated before."""
    return unpatchify(patches, encoder.grid(like.shape), encoder.patch_size)[:, :, : like.shape[2]]
