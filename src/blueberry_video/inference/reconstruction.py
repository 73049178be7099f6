"""What a masked autoencoder makes of the hidden patches, as a video."""

import torch
from torch import Tensor

from blueberry_video.models.masked_autoencoder import MaskedAutoencoder
from blueberry_video.nn.patches import normalize_patches, patchify, unpatchify


@torch.no_grad()
def reconstruct(model: MaskedAutoencoder, video: Tensor, inputs: Tensor, keep: Tensor, target: Tensor) -> Tensor:
    """Fills the hidden patches of ``video`` with the model's prediction.

    The model predicts patches of zero mean and unit variance, so the **true** mean and standard deviation of each
    hidden patch are put back: the picture shows the texture and the edges the model found, not the colours.

    Args:
        model: the autoencoder.
        video: (B, C, T, H, W) in [0, 1].
        inputs: the same video, normalised as the encoder wants it.
        keep: (B, N_visible) indices of the visible tokens.
        target: (B, N_target) indices of the hidden ones.

    Returns:
        (B, C, T, H, W) in [0, 1]: visible patches as they are, hidden ones as predicted.
    """
    patch_size = model.encoder.patch_size
    patches = patchify(video, patch_size).clone()  # (B, N, P, C); without the copy, some shapes would share memory
    _, mean, std = normalize_patches(patches)
    predicted = model(inputs, keep, target).float()
    predicted = predicted.view(*target.shape, *patches.shape[2:])
    rows = torch.arange(len(video), device=video.device)[:, None]
    patches[rows, target] = predicted * std[rows, target] + mean[rows, target]
    return unpatchify(patches, model.encoder.grid(video.shape), patch_size).clamp(0, 1)


def hide(video: Tensor, target: Tensor, grid: tuple[int, int, int], patch_size: tuple[int, int, int]) -> Tensor:
    """The video (B, C, T, H, W) as the model sees it: hidden patches in black."""
    patches = patchify(video, patch_size).clone()
    patches[torch.arange(len(video), device=video.device)[:, None], target] = 0
    return unpatchify(patches, grid, patch_size)
