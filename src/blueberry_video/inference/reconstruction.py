"""What a masked autoencoder makes of the hidden patches, as a video."""

import torch
from torch import Tensor

from blueberry_video.models.encoder import Encoder
from blueberry_video.models.masked_autoencoder.model import MaskedAutoencoder
from blueberry_video.nn.patches import normalize_patches, patchify, unpatchify


@torch.no_grad()
def reconstruct(model: MaskedAutoencoder, video: Tensor, inputs: Tensor, keep: Tensor, target: Tensor) -> Tensor:
    """Fills the hidden patches of ``video`` with the model's prediction.

    The model predicts patches of zero mean and unit variance, so the **true** mean and standard deviation of each
    hidden patch are put back: the picture shows the texture and the edges the model found, not the colours. How targets
    kept from dividing by zero makes no difference that could be seen.

    Args:
        model: the autoencoder.
        video: (B, C, T, H, W) in [0, 1].
        inputs: the same video, normalised as the encoder wants it.
        keep: (B, N_visible) indices of the visible tokens.
        target: (B, N_target) indices of the predicted ones.

    Returns:
        (B, C, T, H, W) in [0, 1]: visible patches as they are, others as predicted, black where neither is.
    """
    encoder = model.encoder
    patches = patchify(encoder.as_clip(video), encoder.patch_size)  # (B, N, P, C)
    _, mean, std = normalize_patches(patches)
    predicted = model(inputs, keep, target).float().view(*target.shape, *patches.shape[2:])
    rows = torch.arange(len(video), device=video.device)[:, None]
    filled = torch.zeros_like(patches)
    filled[rows, target] = predicted * std[rows, target] + mean[rows, target]
    filled[rows, keep] = patches[rows, keep]
    return _as_video(encoder, filled, video).clamp(0, 1)


def hide(encoder: Encoder, video: Tensor, keep: Tensor) -> Tensor:
    """The video (B, C, T, H, W) as the model sees it: patches that are not in ``keep`` (B, N_visible) in black."""
    patches = patchify(encoder.as_clip(video), encoder.patch_size)
    rows = torch.arange(len(video), device=video.device)[:, None]
    seen = torch.zeros_like(patches)
    seen[rows, keep] = patches[rows, keep]
    return _as_video(encoder, seen, video)


def _as_video(encoder: Encoder, patches: Tensor, like: Tensor) -> Tensor:
    """Patches (B, N, P, C) as a video of the shape of ``like``: a single frame was repeated to be cut."""
    return unpatchify(patches, encoder.grid(like.shape), encoder.patch_size)[:, :, : like.shape[2]]
