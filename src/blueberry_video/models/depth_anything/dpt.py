"""DPT head of Depth Anything: tokens of four layers of an image transformer to one map (arXiv 2103.13413, 2401.10891).

Parameter names are those of the original code (github.com/DepthAnything/Depth-Anything-V2). It has no batch norm and
no class token.

Shapes: B images, (h, w) patches of P pixels, D width of the encoder, C features of the head.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Temporal = Sequence[Callable[[Tensor], Tensor]]  # four modules of maps (B, C, H, W)


class DPTHead(nn.Module):
    """Tokens of four layers to a map of P h x P w pixels.

    Args:
        embed_dim: D.
        features: C.
        out_channels: channels of the four reassembled maps, of 4, 2, 1 and 1/2 times the resolution of the patches.
        patch_size: P.
        max_depth: ``None`` for affine-invariant disparity, at least 0; or the largest metric depth in meters, by which
            a sigmoid is multiplied; or infinity for metric depth without a bound (ReLU), as in the metric models of
            Video Depth Anything.

    Raises:
        ValueError: for sizes out of range, other than four channels, or an odd number of features.
    """

    def __init__(
        self,
        embed_dim: int,
        features: int = 64,
        out_channels: Sequence[int] = (48, 96, 192, 384),
        patch_size: int = 14,
        max_depth: float | None = None,
    ):
        super().__init__()
        if len(out_channels) != 4 or min(embed_dim, features, patch_size, *out_channels) < 1 or features % 2:
            raise ValueError(
                f"out_channels={list(out_channels)} must be four numbers, and embed_dim={embed_dim}, "
                f"features={features} (even) and patch_size={patch_size} at least 1."
            )
        if max_depth is not None and not max_depth > 0:
            raise ValueError(f"max_depth={max_depth} must be above 0, or null for relative disparity.")
        self.patch_size, self.max_depth = patch_size, max_depth
        self.projects: Any = nn.ModuleList(nn.Conv2d(embed_dim, channels, 1) for channels in out_channels)
        first, second, _, last = out_channels
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(first, first, 4, stride=4),
                nn.ConvTranspose2d(second, second, 2, stride=2),
                nn.Identity(),
                Conv2d(last, last, 3, stride=2, padding=1),
            ]
        )
        self.scratch: Any = nn.Module()
        for index, channels in enumerate(out_channels, 1):
            setattr(self.scratch, f"layer{index}_rn", Conv2d(channels, features, 3, padding=1, bias=False))
            setattr(self.scratch, f"refinenet{index}", Fusion(features))
        self.scratch.output_conv1 = Conv2d(features, features // 2, 3, padding=1)
        # unused, as in the original: frozen, because distributed training requires a gradient of every parameter
        self.scratch.get_submodule("refinenet4.resConfUnit1").requires_grad_(False)
        self.bounded = max_depth is not None and math.isfinite(max_depth)
        to_map = Conv2d(32, 1, 1)
        if not self.bounded and to_map.bias is not None:  # from scratch, the ReLU could be 0 everywhere and stay so
            nn.init.ones_(to_map.bias)
        activation = nn.Sigmoid() if self.bounded else nn.ReLU()
        self.scratch.output_conv2 = nn.Sequential(
            Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(), to_map, activation
        )

    def forward(self, layers: Sequence[Tensor], grid: tuple[int, int], temporal: Temporal | None = None) -> Tensor:
        """Predicts maps.

        Args:
            layers: tokens (B, h w, D) of four layers after the final norm, the first layer first.
            grid: (h, w).
            temporal: modules that are applied to the third and fourth reassembled map and to the two coarsest fused
                ones, as in Video Depth Anything; ``None`` for none.

        Returns:
            (B, P h, P w), disparity at least 0, or depth in meters in [0, ``max_depth``].

        Raises:
            ValueError: for other than four layers, or a number of tokens that is not h w.
        """
        h, w = grid
        if len(layers) != 4 or any(layer.shape[1] != h * w for layer in layers):
            shapes = [tuple(layer.shape) for layer in layers]
            raise ValueError(f"layers have shapes {shapes}: they must be four of (B, {h * w}, D), for a grid {grid}.")
        maps = []
        for tokens, project, resize in zip(layers, self.projects, self.resize_layers):
            # a 1 x 1 convolution is a linear layer of tokens, which is faster on the CPU
            projected = F.linear(tokens, project.weight[:, :, 0, 0], project.bias)
            maps.append(resize(projected.transpose(1, 2).unflatten(2, (h, w))))
        if temporal is not None:
            maps[2:] = [module(each) for module, each in zip(temporal[:2], maps[2:])]
        skips = [getattr(self.scratch, f"layer{index}_rn")(each) for index, each in enumerate(maps, 1)]
        x: Tensor | None = None
        for index in (4, 3, 2, 1):
            size = skips[index - 2].shape[2:] if index > 1 else tuple(2 * side for side in skips[0].shape[2:])
            x = getattr(self.scratch, f"refinenet{index}")(x, skips[index - 1], size)
            if temporal is not None and index > 2:
                x = temporal[6 - index](x)
        x = resized(self.scratch.output_conv1(x), (h * self.patch_size, w * self.patch_size))
        out = self.scratch.output_conv2(x)[:, 0]
        return out * self.max_depth if self.max_depth is not None and self.bounded else out


class Fusion(nn.Module):
    """Sum of a coarser map and the map of a layer, refined and resized: two (B, C, H, W) -> (B, C, H', W').

    ``resConfUnit1`` of the coarsest fusion, which has no coarser map, is unused, as in the original.
    """

    def __init__(self, features: int):
        super().__init__()
        self.out_conv = Conv2d(features, features, 1)
        self.resConfUnit1, self.resConfUnit2 = ResidualUnit(features), ResidualUnit(features)

    def forward(self, coarser: Tensor | None, layer: Tensor, size: Sequence[int]) -> Tensor:
        x = layer if coarser is None else coarser + self.resConfUnit1(layer)
        return self.out_conv(resized(self.resConfUnit2(x), size))


class ResidualUnit(nn.Module):
    """Pre-activation residual unit of two convolutions of 3 x 3."""

    def __init__(self, features: int):
        super().__init__()
        self.conv1, self.conv2 = (Conv2d(features, features, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Conv2d(nn.Conv2d):
    """2-D convolution, on the CPU with channels-last inputs, which take three quarters of the time (ViT-S, 518 px)."""

    def forward(self, x: Tensor) -> Tensor:
        # clone, not contiguous: torch.export would drop that where it predicts channels-last outputs of a convolution
        return super().forward(x.clone(memory_format=torch.channels_last) if x.device.type == "cpu" else x)


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear interpolation of (B, C, H, W) to a size, with aligned corners."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)
