"""Quality of reconstructed videos, and reconstructions without a network as baselines."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

TRIVIAL = ("mean", "still", "blocks")


def psnr(reconstruction: Tensor, video: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB (B,) of clips (B, C, T, H, W) in [-1, 1]; the reconstruction is clamped."""
    error = (reconstruction.float().clamp(-1, 1) - video.float()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def ssim(reconstruction: Tensor, video: Tensor) -> Tensor:
    """Structural similarity (B,), mean over frames, of clips (B, C, T, H, W) in [-1, 1] of at least 11 pixels a side.

    Gaussian window of 11 pixels with a standard deviation of 1.5 (Wang et al. 2004), computed by torchmetrics.
    """
    made, real = (clip.float().clamp(-1, 1).transpose(1, 2).flatten(0, 1) for clip in (reconstruction, video))
    values = structural_similarity_index_measure(made, real, data_range=(-1.0, 1.0), reduction="none")
    assert isinstance(values, Tensor)
    return values.view(len(video), -1).mean(dim=1)


def trivial_reconstructions(video: Tensor, stride: tuple[int, int, int]) -> dict[str, Tensor]:
    """Baseline reconstructions without a network, each (B, C, T, H, W) as ``video``.

    ``mean``: the mean colour of the clip; ``still``: the mean of its frames; ``blocks``: the mean colour of the pixels
    that each latent of an autoencoder with this ``stride`` covers, the first frame separately.
    """
    before = video[:, :, :1].expand(-1, -1, stride[0] - 1, -1, -1)  # completes the group of the first frame
    blocks = F.avg_pool3d(torch.cat([before, video], dim=2).float(), stride).to(video.dtype)  # no bfloat16 on the CPU
    for dim, size in zip((2, 3, 4), stride):
        blocks = blocks.repeat_interleave(size, dim)
    return {
        "mean": video.mean(dim=(2, 3, 4), keepdim=True).expand_as(video),
        "still": video.mean(dim=2, keepdim=True).expand_as(video),
        "blocks": blocks[:, :, stride[0] - 1 :],
    }
