"""Videos of embeddings of clips."""

import torch
from einops import repeat
from torch import Tensor

from blueberry_video.inference.reconstruction import hide
from blueberry_video.models.jepa.model import JEPA


@torch.no_grad()
def latent_pictures(
    model: JEPA, video: Tensor, inputs: Tensor, latents: Tensor, keep: Tensor, target: Tensor, mask_index: int = 0
) -> list[Tensor]:
    """Renders clips, their visible patches, target embeddings, and the same with the predicted embeddings inserted.

    Args:
        model: the JEPA that predicts embeddings.
        video: (B, C, T, H, W) in [0, 1].
        inputs: the same video, normalized as the encoder requires.
        latents: (B, N, D), the target embeddings of all tokens.
        keep: (B, N_visible) indices of the visible tokens.
        target: (B, N_target) indices of the predicted tokens.
        mask_index: mask token of these masks, see :class:`~blueberry_video.models.jepa.model.JEPA`.

    Returns:
        Four videos (B, 3, T, H, W) in [0, 1]. In both videos of embeddings, red, green and blue are the first three
        principal components of ``latents`` over clips and positions; the range covers three standard deviations to
        either side. Each token is a block of the size of its patch.
    """
    encoder = model.encoder
    predicted = model(inputs, keep, target, mask_index).to(latents.dtype)
    filled = latents.scatter(1, target.unsqueeze(-1).expand_as(predicted), predicted)
    tokens = latents.flatten(0, 1).float()
    mean = tokens.mean(dim=0)
    _, values, directions = torch.linalg.svd(tokens - mean, full_matrices=False)
    scale = (values[:3] / len(tokens) ** 0.5).clamp_min(1e-6)
    (t, h, w), (pt, ph, pw) = encoder.grid(video.shape), encoder.patch_size
    pt = min(pt, video.shape[2])  # a single frame

    def render(embeddings: Tensor) -> Tensor:
        components = (embeddings.float() - mean) @ directions[:3].T / scale  # (B, N, 3), of unit variance over latents
        pattern = "b (t h w) c -> b c (t pt) (h ph) (w pw)"
        return repeat((components / 6 + 0.5).clamp(0, 1), pattern, t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)

    return [video, hide(encoder, video, keep), render(latents), render(filled)]
