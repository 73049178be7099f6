"""Multi-head self-attention over a token sequence."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from blueberry_video.nn.rope import Rotation, rotate
from blueberry_video.parallel.sequence import TokenShards


class Attention(nn.Module):
    """Full self-attention with a fused query-key-value projection.

    Args:
        dim: width of the tokens.
        num_heads: number of heads; must divide ``dim``.
        qkv_bias: projections with a bias: ``"qkv"`` all three (ViT); ``"qv"`` query and value (BEiT, VideoMAE: a bias
            on the keys shifts all scores of a row equally and cancels in the softmax); ``"none"``.

    Raises:
        ValueError: if ``num_heads`` does not divide ``dim`` or ``qkv_bias`` is unknown.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: str = "qkv"):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must be a positive divisor of the width dim={dim}.")
        if qkv_bias not in ("qkv", "qv", "none"):
            raise ValueError(f"qkv_bias={qkv_bias!r} is unknown: choose 'qkv', 'qv' or 'none'.")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias == "qkv")
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "qv" else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: Rotation | None = None, shards: TokenShards | None = None) -> Tensor:
        """Attention of all tokens: (B, N, D) -> (B, N, D).

        Args:
            x: tokens, with ``shards`` those of this process.
            rotation: rotary position embedding of the queries and keys of ``x``.
            shards: split of the tokens over processes.
        """
        bias: Tensor | None = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.num_heads) for part in qkv.chunk(3, dim=-1))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if shards is not None:
            q, k, v = (part.transpose(1, 2) for part in shards.to_heads(*(part.transpose(1, 2) for part in (q, k, v))))
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D / heads)
        if shards is not None:
            out = shards.to_tokens(out.transpose(1, 2)).transpose(1, 2)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))
