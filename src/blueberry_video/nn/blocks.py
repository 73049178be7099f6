"""Pre-norm transformer block, stochastic depth and an initialization."""

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from blueberry_video.nn.attention import Attention
from blueberry_video.nn.feed_forward import Mlp
from blueberry_video.nn.rope import Rotation
from blueberry_video.parallel.sequence import TokenShards


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole samples during training (Huang et al., arXiv 1603.09382).

    Kept samples are scaled by 1 / (1 - rate), so the expectation does not change.
    """

    def __init__(self, rate: float):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path={rate} must be in [0, 1).")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    """Pre-norm transformer block of attention and MLP: (B, N, D) -> (B, N, D), with an optional rotary embedding.

    With ``layer_scale`` above 0, a learned factor per channel of this initial value scales both residual branches
    (CaiT, arXiv 2103.17239; ``init_values`` in VideoMAE's fine-tuning). The arguments of ``forward`` are those of
    :class:`~blueberry_video.nn.attention.Attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: str = "qkv",
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        layer_scale: float = 0.0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale > 0 else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale > 0 else None

    def forward(self, x: Tensor, rotation: Rotation | None = None, shards: TokenShards | None = None) -> Tensor:
        attended = self.attn(self.norm1(x), rotation, shards)
        x = x + self.drop_path(attended if self.gamma_1 is None else self.gamma_1 * attended)
        fed = self.mlp(self.norm2(x))
        return x + self.drop_path(fed if self.gamma_2 is None else self.gamma_2 * fed)


def init_trunc_normal(transformer: nn.Module) -> None:
    """Initializes a transformer as V-JEPA does: linear and 3-D convolution weights truncated normal with std 0.02, zero
    biases.

    The output projections of attention and MLP in block i of ``transformer.blocks`` are scaled by 1 / sqrt(2 (i + 1)).
    LayerNorm and bare parameters keep their values.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    with torch.no_grad():
        for i, block in enumerate(cast(Iterable[Block], transformer.blocks)):
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.div_(math.sqrt(2 * (i + 1)))
