"""Attentive pooling of tokens and a classification head."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from blueberry_video.nn.blocks import Block, init_trunc_normal
from blueberry_video.nn.feed_forward import Mlp


class AttentivePool(nn.Module):
    """Attentive pooling (V-JEPA, arXiv 2404.08471): learned queries attend to all tokens, followed by an MLP.

    Args:
        dim: width of the tokens.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over ``dim``.
        norm_eps: of the LayerNorms; 1e-5 in the probes published with V-JEPA and V-JEPA 2, 1e-6 in transformers.
        depth: number of blocks, the first ``depth - 1`` of them self-attention; 4 in V-JEPA 2's probe.
        num_queries: number of learned queries.
        complete_block: cross-attention in a block with LayerNorms, a residual connection and an MLP; false: the
            cross-attention alone.
        published: initialization and weight decay of the published probes: truncated normal weights with std 0.02,
            zero biases, output layers scaled down by depth, and a query with weight decay. False: the initialization of
            PyTorch, and a query without weight decay.

    Raises:
        ValueError: if ``num_heads`` does not divide ``dim``, or ``depth`` or ``num_queries`` is below 1.
    """

    block_lists: ClassVar[tuple[str, ...]] = ("blocks",)  # sharded one by one
    no_weight_decay: tuple[str, ...] = ()

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-5,
        depth: int = 1,
        num_queries: int = 1,
        complete_block: bool = True,
        published: bool = True,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must be a positive divisor of the width dim={dim}.")
        if depth < 1 or num_queries < 1:
            raise ValueError(f"depth={depth} and num_queries={num_queries} of attentive pooling must be at least 1.")
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(1, num_queries, dim))
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps) if complete_block else None
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps) if complete_block else None
        self.mlp = Mlp(dim, round(dim * mlp_ratio)) if complete_block else None
        nn.init.trunc_normal_(self.query, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, norm_eps=norm_eps) for _ in range(depth - 1))
        if published:
            self._init_published()
        else:
            self.no_weight_decay = ("query",)

    @torch.no_grad()
    def _init_published(self) -> None:
        init_trunc_normal(self)
        if self.mlp is not None:  # as the last block of self-attention: the original counts both as one layer
            self.mlp.fc2.weight.div_(math.sqrt(2 * max(len(self.blocks), 1)))

    def pool_queries(self, tokens: Tensor) -> Tensor:
        """Pooled vector of each query: (B, N, D) -> (B, num_queries, D)."""
        for block in self.blocks:
            tokens = block(tokens)
        query = self.query.expand(tokens.shape[0], -1, -1)
        if self.norm1 is not None:
            tokens = self.norm1(tokens)
        q = rearrange(self.q(query), "b n (h d) -> b h n d", h=self.num_heads)
        k, v = rearrange(self.kv(tokens), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        pooled = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        if self.norm2 is None or self.mlp is None:
            return pooled
        query = query + pooled
        return query + self.mlp(self.norm2(query))

    def forward(self, tokens: Tensor) -> Tensor:
        """Pooled vector of the first query: (B, N, D) -> (B, D)."""
        return self.pool_queries(tokens)[:, 0]


class ClassificationHead(nn.Module):
    """Pooling of tokens and one linear classifier per label: (B, N, D) -> {label: logits (B, classes)}.

    Mean pooling gives VideoMAE's fine-tuning head (mean over tokens, LayerNorm, linear layer initialized a thousand
    times smaller); attentive pooling without LayerNorm V-JEPA's probe, with a depth of 4 V-JEPA 2's.

    Args:
        dim: width of the tokens.
        num_classes: number of classes of each label, such as ``{"motion": 8}``.
        pooling: ``"mean"`` or ``"attentive"``; ``"first"``: the first token, as VideoMAE without mean
            pooling, whose encoder has a final norm and whose head has none.
        num_heads: attention heads of the attentive pooling.
        dropout: on the pooled vector.
        init_scale: factor on the initial weights of the linear layers, truncated normal with std 0.02; ``None``: the
            initialization of PyTorch, as in the published probes.
        pool_depth: ``depth`` of :class:`AttentivePool`.
        final_norm: LayerNorm on the pooled vector.
        pool_eps, complete_block, published_pool: ``norm_eps``, ``complete_block`` and ``published`` of
            :class:`AttentivePool`.

    Raises:
        ValueError: if ``pooling`` is unknown or ``num_classes`` empty.
    """

    def __init__(
        self,
        dim: int,
        num_classes: dict[str, int],
        pooling: str = "mean",
        num_heads: int = 1,
        dropout: float = 0.0,
        init_scale: float | None = 0.001,
        pool_depth: int = 1,
        final_norm: bool = True,
        pool_eps: float = 1e-5,
        complete_block: bool = True,
        published_pool: bool = True,
    ):
        super().__init__()
        if pooling not in ("mean", "attentive", "first"):
            raise ValueError(f"pooling={pooling!r} is unknown: choose 'mean', 'attentive' or 'first'.")
        if not num_classes:
            raise ValueError("num_classes={} must name at least one label with its class count, such as {motion: 8}.")
        self.pool: AttentivePool | None = None
        if pooling == "attentive":
            options = {"complete_block": complete_block, "published": published_pool}
            self.pool = AttentivePool(dim, num_heads, norm_eps=pool_eps, depth=pool_depth, **options)
        self.first = pooling == "first"
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if final_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.ModuleDict()
        for name, count in num_classes.items():
            linear = nn.Linear(dim, count)
            if init_scale is not None:
                nn.init.trunc_normal_(linear.weight, std=0.02 * init_scale)
                nn.init.zeros_(linear.bias)
            self.linear[name] = linear

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        pooled = self.pool(tokens) if self.pool is not None else tokens[:, 0] if self.first else tokens.mean(dim=1)
        pooled = self.dropout(self.fc_norm(pooled))
        return {name: linear(pooled) for name, linear in self.linear.items()}
