"""Multi-level encoder for deep supervision (V-JEPA 2.1, arXiv 2603.14482)."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blueberry_video.models.encoder import Encoder
from blueberry_video.parallel.sequence import sequence_parallel


class MultiLevelEncoder(Encoder):
    """Tokens of evenly spaced blocks of an encoder, each level after a separate LayerNorm, concatenated along channels:
    (B, C, T, H, W) -> (B, N or N_kept, levels * D). The last block comes last.

    Args:
        encoder: its ``blocks`` are modules (B, N, D) -> (B, N, D); it needs no final norm.
        levels: number of blocks; 4 of 12 are the 3rd, 6th, 9th and 12th.

    Raises:
        ValueError: the encoder has fewer than ``levels`` blocks; in ``forward``, the outputs of its blocks do not have
            the tokens of its output.
    """

    def __init__(self, encoder: Encoder, levels: int = 4):
        channels, frames, size, _ = encoder.video_size
        tubelet, patch, _ = encoder.patch_size
        super().__init__(size, frames, patch, tubelet, levels * encoder.embed_dim, channels, encoder.images)
        depth = len(cast(nn.ModuleList, getattr(encoder, "blocks", [])))
        if not 1 <= levels <= depth:
            raise ValueError(f"levels={levels} must be from 1 to {depth}, the number of blocks of the encoder.")
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
            with sequence_parallel(None):  # blocks would have the tokens of one process
                tokens = self.encoder(video, keep)
        finally:
            for hook in hooks:
                hook.remove()
        same = [isinstance(level, Tensor) and level.shape[:2] == tokens.shape[:2] for level in found]
        if same != [True] * self.levels:
            raise ValueError(
                f"the blocks of {type(self.encoder).__name__} do not output the tokens of the encoder, (B, N) = "
                f"{tuple(tokens.shape[:2])}: use an encoder such as VisionTransformer."
            )
        return torch.cat([norm(level) for norm, level in zip(self.norms, found, strict=True)], dim=-1)


def normalize_levels(tokens: Tensor, levels: int) -> Tensor:
    """Applies a LayerNorm without affine to each of the levels that (…, levels * D) concatenates."""
    parts = tokens.unflatten(-1, (levels, -1))
    return F.layer_norm(parts, parts.shape[-1:]).flatten(-2)
