"""Depth Anything (arXiv 2401.10891, 2406.09414; github.com/DepthAnything): depth of single images.

Shapes: B images of H x W pixels.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from blueberry_video.models.depth_anything.convert import convert_published
from blueberry_video.models.depth_anything.dpt import DPTHead
from blueberry_video.models.dinov2 import DINOv2
from blueberry_video.weights.diffusers_folder import read_source
from blueberry_video.weights.load import load_strictly


class DepthAnything(nn.Module):
    """DINOv2 and a DPT head: images (B, 3, H, W), normalized with ImageNet mean and std, to maps (B, H, W).

    H and W are multiples of the patch size. Maps are affine-invariant disparity, at least 0 and larger for nearer
    pixels; with ``max_depth`` of the head, depth in meters. Parameter names are those of the original.

    Args:
        encoder: image transformer, ``pretrained`` in the original.
        taps: indices of the four blocks, ascending, from which the head reads: 2, 5, 8, 11 in V2 S and B; the last four
            in V1.
        features, out_channels, max_depth: see :class:`~blueberry_video.models.depth_anything.dpt.DPTHead`.

    Raises:
        ValueError: for taps that are not four ascending indices of blocks; in ``forward``, for images that are not
            (B, 3, H, W) with H and W in whole patches (the message names the nearest size).
    """

    def __init__(
        self,
        encoder: DINOv2,
        taps: Sequence[int] = (2, 5, 8, 11),
        features: int = 64,
        out_channels: Sequence[int] = (48, 96, 192, 384),
        max_depth: float | None = None,
    ):
        super().__init__()
        self.taps = checked_taps(taps, len(encoder.blocks))
        self.max_depth, self.patch_size = max_depth, encoder.patch_size[1]
        self.pretrained = encoder
        self.depth_head = DPTHead(encoder.embed_dim, features, out_channels, self.patch_size, max_depth)

    def forward(self, images: Tensor) -> Tensor:
        """Predicts maps (B, H, W)."""
        if images.ndim != 4:
            raise ValueError(f"images has shape {tuple(images.shape)}: it must be (B, 3, H, W).")
        layers = [tokens for tokens, _ in self.pretrained.tokens_behind(images[:, :, None], self.taps)]
        return self.depth_head(layers, (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size))

    def load_published(self, source: str | Path) -> str:
        """Loads a checkpoint of the original or a folder of transformers strictly; returns a message that names it."""
        weights = convert_published(read_source(source)[1], source)
        load_strictly(self, weights, source, "Build the model in the size of the weights.")
        return f"loaded {len(weights)} tensors from {source}"


def checked_taps(taps: Sequence[int], blocks: int) -> tuple[int, ...]:
    """Returns ``taps`` if they are four ascending indices of ``blocks`` blocks; raises ``ValueError`` otherwise."""
    if len(taps) != 4 or list(taps) != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] < blocks:
        raise ValueError(f"taps={list(taps)} must be four ascending indices of the blocks, 0 to {blocks - 1}.")
    return tuple(taps)
