"""From tokens to one vector a clip, or one a question."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from blueberry_video.nn.blocks import Block
from blueberry_video.nn.feed_forward import Mlp


class AttentivePool(nn.Module):
    """Learnable queries that attend to all tokens, then an MLP: the probe of V-JEPA (arXiv 2404.08471). (B, N, D) ->
    (B, D).

    Args:
        dim: width of the tokens.
        num_heads: attention heads.
        mlp_ratio: hidden over outer width of the MLPs.
        norm_eps: of the LayerNorms; 1e-5 in the probes published with V-JEPA and V-JEPA 2, 1e-6 in transformers.
        depth: 1, or more to have ``depth - 1`` blocks of self-attention before: V-JEPA 2's probe has 4 in all.
        num_queries: see :meth:`ask`.

    Raises:
        ValueError: if ``num_heads`` does not divide ``dim``, or for a depth or number of queries below 1.
    """

    no_weight_decay = ("query",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        depth: int = 1,
        num_queries: int = 1,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the width {dim}: choose a divisor of {dim}.")
        if depth < 1 or num_queries < 1:
            raise ValueError(f"attentive pooling of depth={depth} with num_queries={num_queries}: both are 1 or more.")
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(1, num_queries, dim))
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, norm_eps=norm_eps) for _ in range(depth - 1))

    def ask(self, tokens: Tensor) -> Tensor:
        """What each query finds: (B, N, D) -> (B, num_queries, D)."""
        for block in self.blocks:
            tokens = block(tokens)
        query = self.query.expand(tokens.shape[0], -1, -1)
        q = rearrange(self.q(query), "b n (h d) -> b h n d", h=self.num_heads)
        k, v = rearrange(self.kv(self.norm1(tokens)), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        query = query + rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        return query + self.mlp(self.norm2(query))

    def forward(self, tokens: Tensor) -> Tensor:
        """What the first query finds: (B, N, D) -> (B, D)."""
        return self.ask(tokens)[:, 0]


class ClassificationHead(nn.Module):
    """Pools the tokens of a clip and scores its classes, one linear layer a label: (B, N, D) -> {label: (B, classes)}.

    With mean pooling it is the head VideoMAE fine-tunes with (mean over tokens, LayerNorm, linear layer initialised a
    thousand times smaller); with attentive pooling and without LayerNorm the probe of V-JEPA, and of V-JEPA 2 with a
    depth of 4.

    Args:
        dim: width of the tokens.
        num_classes: number of classes of each label, such as ``{"motion": 8}``.
        pooling: ``"mean"`` or ``"attentive"``.
        num_heads: attention heads of the attentive pooling.
        dropout: on the pooled vector.
        init_scale: factor on the initial weights of the linear layers.
        pool_depth: blocks of the attentive pooling, see :class:`AttentivePool`.
        final_norm: LayerNorm on the pooled vector.

    Raises:
        ValueError: for an unknown pooling, or no label.
    """

    def __init__(
        self,
        dim: int,
        num_classes: dict[str, int],
        pooling: str = "mean",
        num_heads: int = 1,
        dropout: float = 0.0,
        init_scale: float = 0.001,
        pool_depth: int = 1,
        final_norm: bool = True,
    ):
        super().__init__()
        if pooling not in ("mean", "attentive"):
            raise ValueError(f"pooling={pooling!r} is unknown: choose 'mean' or 'attentive'.")
        if not num_classes:
            raise ValueError("num_classes is empty: name at least one label with its number of classes: {motion: 8}.")
        self.pool = AttentivePool(dim, num_heads, depth=pool_depth) if pooling == "attentive" else None
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if final_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.ModuleDict()
        for name, count in num_classes.items():
            linear = nn.Linear(dim, count)
            nn.init.trunc_normal_(linear.weight, std=0.02 * init_scale)
            nn.init.zeros_(linear.bias)
            self.linear[name] = linear

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        pooled = self.pool(tokens) if self.pool is not None else tokens.mean(dim=1)
        pooled = self.dropout(self.fc_norm(pooled))
        return {name: linear(pooled) for name, linear in self.linear.items()}
