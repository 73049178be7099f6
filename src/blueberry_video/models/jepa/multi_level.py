"""Several depths of an encoder at once, for deep supervision (V-JEPA 2.1, arXiv 2603.14482)."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blueberry_video.models.encoder import Encoder


class MultiLevelEncoder(Encoder):
    """Tokens of evenly spaced blocks of an encoder, each level with a LayerNorm of its own, side by side: the last
    block's come last. (B, C, T, H, W) -> (B, N or N_kept, levels * D).

    Args:
        encoder: has its blocks, modules of (B, N, D) -> (B, N, D), as ``blocks``; it needs no norm after the last one.
        levels: blocks to take; 4 of 12 are the 3rd, 6th, 9th and 12th.

    Raises:
        ValueError: if the encoder has no ``blocks``, or fewer than ``levels``; in ``forward`` if what its blocks give
            are not the tokens it gives itself.
    """

    def __init__(self, encoder: Encoder, levels: int = 4):
        channels, frames, size, _ = encoder.video_size
        tubelet, patch, _ = encoder.patch_size
        super().__init__(size, frames, patch, tubelet, levels * encoder.embed_dim, channels, encoder.images)
        depth = len(cast(nn.ModuleList, getattr(encoder, "blocks", [])))
        if not 1 <= levels <= depth:
            raise ValueError(f"levels={levels} of an encoder of {depth} blocks: use a number from 1 to {depth}.")
        self.encoder, self.levels = encoder, levels
        self.depths = [(level + 1) * depth // levels - 1 for level in range(levels)]
        self.norms = nn.ModuleList(nn.LayerNorm(encoder.embed_dim, eps=1e-6) for _ in range(levels))

    def as_clip(self, video: Tensor) -> Tensor:
        return self.encoder.as_clip(video)

    def forward(self, video: Tensor, keep: Tensor | None = None) -> Tensor:
        found: list[Tensor] = []
        blocks = cast(nn.ModuleList, self.encoder.blocks)
        hooks = [blocks[depth].register_forward_hook(lambda *call: found.append(call[2])) for depth in self.depths]
        try:
            tokens = self.encoder(video, keep)
        finally:
            for hook in hooks:
                hook.remove()
        same = [isinstance(level, Tensor) and level.shape[:2] == tokens.shape[:2] for level in found]
        if same != [True] * self.levels:
            raise ValueError(
                f"the blocks of a {type(self.encoder).__name__} do not give the tokens that it gives itself, "
                f"(B, N) = {tuple(tokens.shape[:2])}: take levels of an encoder whose blocks do, such as a "
                "VisionTransformer."
            )
        return torch.cat([norm(level) for norm, level in zip(self.norms, found, strict=True)], dim=-1)


def normalize_levels(tokens: Tensor, levels: int) -> Tensor:
    """LayerNorm without affine part of each of the ``levels`` that lie side by side in (…, levels * D)."""
    parts = tokens.unflatten(-1, (levels, -1))
    return F.layer_norm(parts, parts.shape[-1:]).flatten(-2)
