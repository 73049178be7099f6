"""Blocks of CogVideoX (arXiv 2408.06072): text and video as one sequence with shared weights, LayerNorms included; only
shift, scale and gate are separate for each ("expert" adaptive LayerNorm). Parameter names are those of diffusers.

Letters: B clips, T H W latent frames, rows and columns, N video tokens, L text tokens, D width, E width of the
condition, K conditions per clip: 1, or the number of frames of patches.
"""

import functools
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from blueberry_video.nn.feed_forward import FeedForward
from blueberry_video.nn.joint_attention import HeadNormAttention, Shared
from blueberry_video.nn.timestep_conditioning import gated, modulate


class Condition(NamedTuple):
    """SiLU of the timestep embedding, the input of the modulation: of the text (B, 1, E), of the video (B, K, E)."""

    text: Tensor
    video: Tensor


class PatchEmbedding(nn.Module):
    """Patch embedding of latents, with the projection of text tokens and the position table.

    Args:
        in_channels: C.
        patch_size: (t, h, w).
        text_dim: width of a text token.
        dim: D.
        table: positions (1, L + N, D) over [text, video], a buffer: in the state dict, not trained. ``None``: no table.
    """

    pos_embedding: Tensor | None

    def __init__(
        self, in_channels: int, patch_size: tuple[int, int, int], text_dim: int, dim: int, table: Tensor | None
    ):
        super().__init__()
        self.patch_size = patch_size
        tubelet, height, width = patch_size
        self.proj: nn.Conv2d | nn.Linear
        if tubelet == 1:
            self.proj = nn.Conv2d(in_channels, dim, kernel_size=(height, width), stride=(height, width))
        else:
            self.proj = nn.Linear(in_channels * tubelet * height * width, dim)
        self.text_proj = nn.Linear(text_dim, dim)
        self.register_buffer("pos_embedding", table)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, N, D)."""
        if isinstance(self.proj, nn.Conv2d):
            frames = self.proj(rearrange(latents, "b c t h w -> (b t) c h w"))
            return rearrange(frames, "(b t) d h w -> b (t h w) d", b=len(latents))
        pt, ph, pw = self.patch_size
        pattern = "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)"
        return self.proj(rearrange(latents, pattern, pt=pt, ph=ph, pw=pw))


class ExpertNorm(nn.Module):
    """Expert adaptive LayerNorm: one LayerNorm, with separate modulation of text and video.

    (text (B, L, D), video (B, N, D)) -> both normalized and modulated, and their gates (B, 1, D) and (B, K, D).
    """

    def __init__(self, dim: int, condition_dim: int):
        super().__init__()
        self.linear = nn.Linear(condition_dim, 6 * dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, text: Tensor, video: Tensor, condition: Condition) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        of_video = self.linear(condition.video).chunk(6, dim=-1)
        of_text = of_video if condition.text is condition.video else self.linear(condition.text).chunk(6, dim=-1)
        (shift, scale, gate), (text_shift, text_scale, text_gate) = of_video[:3], of_text[3:]
        text = modulate(self.norm(text), text_shift, text_scale)
        return text, modulate(self.norm(video), shift, scale), text_gate, gate


class CogVideoXBlock(nn.Module):
    """Transformer block over [text, video]: (text (B, L, D), video (B, N, D)) -> the same shapes.

    Args:
        dim: D; a multiple of ``num_heads``.
        num_heads: attention heads.
        condition_dim: E.
    """

    def __init__(self, dim: int, num_heads: int, condition_dim: int):
        super().__init__()
        self.norm1 = ExpertNorm(dim, condition_dim)
        self.attn1 = HeadNormAttention(dim, num_heads, functools.partial(nn.LayerNorm, eps=1e-6))
        self.norm2 = ExpertNorm(dim, condition_dim)
        self.ff = FeedForward(dim, 4 * dim)

    def forward(
        self, text: Tensor, video: Tensor, condition: Condition, shared: Shared, layer: int = 0
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            text: (B, L, D); empty where the cache holds it.
            video: (B, N, D).
            condition: see :class:`Condition`.
            shared: rotation and attention mask over [text, video], and the KV cache.
            layer: index of the block in the cache.
        """
        sizes = (text.shape[1], video.shape[1])
        normed_text, normed_video, text_gate, gate = self.norm1(text, video, condition)
        of_text, of_video = self.attn1(torch.cat([normed_text, normed_video], dim=1), shared, layer).split(sizes, dim=1)
        text, video = gated(text, text_gate, of_text), gated(video, gate, of_video)
        normed_text, normed_video, text_gate, gate = self.norm2(text, video, condition)
        of_text, of_video = self.ff(torch.cat([normed_text, normed_video], dim=1)).split(sizes, dim=1)
        return gated(text, text_gate, of_text), gated(video, gate, of_video)


class AdaptiveNorm(nn.Module):
    """Adaptive LayerNorm of the output: video (B, N, D), condition (B, K, E) -> (B, N, D)."""

    def __init__(self, dim: int, condition_dim: int, eps: float):
        super().__init__()
        self.linear = nn.Linear(condition_dim, 2 * dim)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, video: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.linear(condition).chunk(2, dim=-1)
        return modulate(self.norm(video), shift, scale)
