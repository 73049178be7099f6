"""Token refiner of HunyuanVideo (arXiv 2412.03603): a small bidirectional transformer over the causal text tokens of a
language model.

The timestep and the mean of the text only gate the residual branches; there is no shift or scale. Padding is masked;
the outputs at padding are meaningless and must be masked in the following layers.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blueberry_video.models.hunyuan_video.blocks import EPS, Modulation
from blueberry_video.nn.feed_forward import FeedForward
from blueberry_video.nn.timestep_conditioning import TimestepMLP, gated, sinusoidal

SINUSOID = 256  # channels of the sinusoidal timestep embedding


class RefinerAttention(nn.Module):
    """Self-attention of the text: (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        projections = (self.to_q, self.to_k, self.to_v)
        q, k, v = (project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for project in projections)
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class RefinerBlock(nn.Module):
    """Pre-norm block of attention and MLP, both gated by the condition: (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        self.attn = RefinerAttention(dim, num_heads)
        self.ff = FeedForward(dim, 4 * dim, "silu")
        self.norm_out = Modulation(dim, 2)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None) -> Tensor:
        gate, mlp_gate = self.norm_out(condition)
        x = gated(x, gate, self.attn(self.norm1(x), mask))
        return gated(x, mlp_gate, self.ff(self.norm2(x)))


class RefinerBlocks(nn.Module):
    """Sequence of ``depth`` refiner blocks."""

    block_lists: ClassVar[tuple[str, ...]] = ("refiner_blocks",)  # sharded one by one

    def __init__(self, dim: int, num_heads: int, depth: int):
        super().__init__()
        self.refiner_blocks = nn.ModuleList(RefinerBlock(dim, num_heads) for _ in range(depth))

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None) -> Tensor:
        for block in self.refiner_blocks:
            x = block(x, condition, mask)
        return x


class TokenRefiner(nn.Module):
    """Token refiner: text tokens of a language model (B, L, text_dim) -> (B, L, D).

    Args:
        text_dim: width of the language model.
        dim: D; a multiple of ``num_heads``.
        num_heads: attention heads.
        depth: number of blocks.
    """

    def __init__(self, text_dim: int, dim: int, num_heads: int, depth: int = 2):
        super().__init__()
        self.depth = depth
        self.time_text_embed = nn.ModuleDict(
            {"timestep_embedder": TimestepMLP(SINUSOID, dim, dim), "text_embedder": TimestepMLP(text_dim, dim, dim)}
        )
        self.proj_in = nn.Linear(text_dim, dim)
        self.token_refiner = RefinerBlocks(dim, num_heads, depth)

    def forward(self, text: Tensor, timestep: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            text: (B, L, text_dim).
            timestep: (B,) in [0, 1000].
            mask: bool (B, L), false at padding; ``None``: no padding.
        """
        keys = None
        if mask is None:
            mean = text.mean(dim=1)
        else:
            count = mask.sum(dim=1, keepdim=True).clamp(min=1)  # the mean of a fully padded text is 0
            mean = (torch.where(mask[..., None], text, 0).float().sum(dim=1) / count).to(text.dtype)
            first = torch.arange(mask.shape[1], device=mask.device) == 0
            keys = (mask | (first & ~mask.any(dim=1, keepdim=True)))[:, None, None]  # no row of a softmax is empty
        embed = self.time_text_embed
        condition = embed["timestep_embedder"](sinusoidal(timestep, SINUSOID)) + embed["text_embedder"](mean)
        return self.token_refiner(self.proj_in(text), condition[:, None], keys)
