"""From tokens to one vector a clip."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from blueberry_video.nn.blocks import Mlp


class AttentivePool(nn.Module):
    """One learnable query that attends to all tokens, then an MLP: the probe of V-JEPA (arXiv 2404.08471). (B, N, D)
    -> (B, D).

    Raises:
        ValueError: if ``num_heads`` does not divide ``dim``.
    """

    no_weight_decay = ("query",)

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, norm_eps: float = 1e-6):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the width {dim}: choose a divisor of {dim}.")
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.query.expand(tokens.shape[0], -1, -1)
        q = rearrange(self.q(query), "b n (h d) -> b h n d", h=self.num_heads)
        k, v = rearrange(self.kv(self.norm1(tokens)), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        query = query + rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        query = query + self.mlp(self.norm2(query))
        return query[:, 0]
