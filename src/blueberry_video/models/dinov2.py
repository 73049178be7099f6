"""DINOv2: an image vision transformer, pre-trained without labels (arXiv 2304.07193;
github.com/facebookresearch/dinov2), with or without registers (arXiv 2309.16588). Parameter names are those of the
original code.

Unusual about it: a class token and, in some files, register tokens stand before the patches; every residual branch has
a scale a channel (LayerScale); ViT-g has a gated MLP (SwiGLU). Positions are a learned table of 37 x 37 places that is
stretched, bicubically, over images of other sizes. How it is stretched is part of the model and differs: without
registers, the original stretches by (patches + 0.1) / 37; with registers, to the exact size and antialiased.
transformers always stretches to the exact size.

The frames of a video are images that know nothing of each other.
"""

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from blueberry_video.models.encoder import Encoder
from blueberry_video.nn.attention import Attention
from blueberry_video.nn.blocks import DropPath
from blueberry_video.nn.embeddings import TubeletEmbed
from blueberry_video.nn.feed_forward import Mlp
from blueberry_video.nn.kept_tokens import KeptTokens
from blueberry_video.weights import files as weight_files
from blueberry_video.weights.load import load_strictly


class DINOv2(Encoder):
    """Encoder of video float (B, C, T, H, W), normalised with ImageNet mean and standard deviation -> tokens (B, N, D),
    those of the patches. T may be any number from 1, H and W any multiples of ``patch_size``.

    Args:
        image_size, num_frames, patch_size, embed_dim, in_channels: see :class:`.encoder.Encoder`.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden over outer width of the MLPs; a gated one has two thirds of it, rounded up to a multiple of 8.
        num_registers: register tokens.
        swiglu: gated MLPs, as ViT-g has.
        table_size: places along each side of the table of positions; published ones have 37.
        interpolate_offset: added to the number of patches where the table is stretched; ``None`` is the original's, 0.1
            without registers and 0 with them. transformers has 0.
        interpolate_antialias: stretch with antialiasing; ``None`` is the original's: with registers.
        layer_scale_init: initial LayerScale.
        drop_path: stochastic depth of all blocks, as the original has it.
        final_norm: LayerNorm after the last block.
        weights: a published file to begin with, see :func:`from_published`; it must have the sizes given.

    Raises:
        ValueError: for sizes that the patches or heads do not divide, no table or a negative number of registers; in
            ``forward`` for a video of other channels, without frames, or not of whole patches, or for a ``keep`` that
            :class:`~blueberry_video.nn.kept_tokens.KeptTokens` refuses.
    """

    no_weight_decay = ("cls_token", "pos_embed", "register_tokens")

    def __init__(
        self,
        image_size: int = 224,
        num_frames: int = 16,
        patch_size: int = 14,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        in_channels: int = 3,
        num_registers: int = 0,
        swiglu: bool = False,
        table_size: int = 37,
        interpolate_offset: float | None = None,
        interpolate_antialias: bool | None = None,
        layer_scale_init: float = 1e-5,
        drop_path: float = 0.0,
        final_norm: bool = True,
        weights: str | None = None,
    ):
        super().__init__(image_size, num_frames, patch_size, 1, embed_dim, in_channels, images=True)
        if table_size < 1 or num_registers < 0:
            raise ValueError(f"table_size={table_size} must be 1 or more, num_registers={num_registers} 0 or more.")
        original_offset = 0.0 if num_registers else 0.1
        self.offset = original_offset if interpolate_offset is None else interpolate_offset
        self.antialias = num_registers > 0 if interpolate_antialias is None else interpolate_antialias
        self.table_size = table_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + table_size**2, embed_dim))
        self.register_tokens = nn.Parameter(torch.empty(1, num_registers, embed_dim)) if num_registers else None
        self.patch_embed = TubeletEmbed(in_channels, embed_dim, self.patch_size)
        hidden = round(embed_dim * mlp_ratio)
        self.blocks = nn.ModuleList(
            DINOv2Block(embed_dim, num_heads, hidden, swiglu, layer_scale_init, drop_path) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6) if final_norm else nn.Identity()
        self.init_weights()
        if weights is not None:
            self.load_published(weights)

    def init_weights(self) -> None:
        """Matrices and positions normal with a deviation of 0.02, cut off; class and register tokens nearly 0; biases
        0. The patch convolution and the norms keep the values they are made with.
        """
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.register_tokens):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def as_clip(self, video: Tensor) -> Tensor:
        """The video itself, of any number of frames and any size that the patches divide."""
        channels, patch = self.video_size[0], self.patch_size[1]
        said = f"the video has (B, C, T, H, W) = {tuple(video.shape)} but the encoder takes"
        if video.ndim != 5 or video.shape[1] != channels or not video.shape[2]:
            raise ValueError(
                f"{said} five dimensions, C = {channels} and T of 1 or more: give a video with frames, and "
                "model.encoder.in_channels its number of channels."
            )
        if any(not size or size % patch for size in video.shape[3:]):
            height, width = (max(round(size / patch), 1) * patch for size in video.shape[3:])
            raise ValueError(f"{said} H and W of whole patches of {patch}: resize it to {height} x {width}.")
        return video

    def forward(self, video: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) and, optionally, indices (B, N_kept) of the visible tokens -> (B, N or N_kept, D)."""
        clip = self.as_clip(video)
        if keep is not None:
            kept = KeptTokens(keep, len(clip), self.grid(clip.shape))
            return kept.pick(kept.encode(clip, self._patches))
        frames = rearrange(clip, "b c t h w -> (b t) c 1 h w")
        return rearrange(self._patches(frames, None), "(b t) n d -> b (t n) d", b=len(clip))

    def tokens_behind(self, frames: Tensor, depths: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        """What stands behind some of the blocks, each behind the final norm: what decoders of depth take.

        Args:
            frames: single frames (B, C, 1, H, W).
            depths: indices of the blocks, ascending, such as (2, 5, 8, 11).

        Returns:
            For each of them the tokens of the patches (B, S, D) and the class token (B, D).

        Raises:
            ValueError: for depths that it has not, or frames that are several.
        """
        last = len(self.blocks) - 1
        if frames.shape[2] != 1 or list(depths) != sorted(set(depths)) or not set(depths) <= {*range(last + 1)}:
            raise ValueError(
                f"depths {depths} of {frames.shape[2]} frames: give ascending indices from 0 to {last}, and single "
                "frames, folded into the batch."
            )
        found, x = [], self._embed(self.as_clip(frames), None)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in depths:
                normed = self.norm(x)
                found.append((normed[:, self._prefix :], normed[:, 0]))
        return found

    @property
    def _prefix(self) -> int:
        """Tokens before the patches."""
        return 1 + (0 if self.register_tokens is None else self.register_tokens.shape[1])

    def _patches(self, frames: Tensor, keep: Tensor | None) -> Tensor:
        """Single frames (B, C, 1, H, W), and of each the tokens to look at (B, n) -> their tokens (B, S or n, D)."""
        x = self._embed(frames, keep)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, self._prefix :])

    def _embed(self, frames: Tensor, keep: Tensor | None) -> Tensor:
        """Class token, registers and patches, (B, prefix + S, D); registers have no position."""
        x, (_, h, w) = self.patch_embed(frames, keep), self.grid(frames.shape)
        places = self._places(h, w)
        x = x + (places if keep is None else places[keep])
        before = [self.cls_token + self.pos_embed[:, :1]]
        before += [] if self.register_tokens is None else [self.register_tokens]
        return torch.cat([*(token.expand(len(x), -1, -1) for token in before), x], dim=1)

    def _places(self, h: int, w: int) -> Tensor:
        """The positions (h * w, D) of an image of so many patches."""
        side, table = self.table_size, self.pos_embed[0, 1:]
        if (h, w) == (side, side):
            return table
        image = rearrange(table.float(), "(h w) d -> 1 d h w", h=side)  # in half precision it would shift
        if self.offset:
            scales = ((h + self.offset) / side, (w + self.offset) / side)
            image = F.interpolate(image, scale_factor=scales, mode="bicubic", antialias=self.antialias)
        else:
            image = F.interpolate(image, size=(h, w), mode="bicubic", antialias=self.antialias)
        return rearrange(image, "1 d h w -> (h w) d").to(table.dtype)

    def convert_published(self, state: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
        return published_weights(state, source)


class DINOv2Block(nn.Module):
    """Pre-norm block whose branches are scaled by a number a channel before they are added. (B, N, D) -> (B, N, D)."""

    def __init__(
        self, dim: int, num_heads: int, hidden_dim: int, swiglu: bool, layer_scale_init: float, drop_path: float
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim, layer_scale_init)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim, (int(hidden_dim * 2 / 3) + 7) // 8 * 8) if swiglu else Mlp(dim, hidden_dim)
        self.ls2 = LayerScale(dim, layer_scale_init)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class LayerScale(nn.Module):
    """(…, D) times one learned number a channel."""

    def __init__(self, dim: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class SwiGLU(nn.Module):
    """Gated MLP (arXiv 2002.05202): SiLU of one half times the other half. (…, D) -> (…, D)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


# ---- published weights -----------------------------------------------------------------------------------------------

# Names in transformers' files -> ours, within a block; query, key and value, three matrices there, are one here.
HUGGINGFACE_BLOCK = {
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
}
HUGGINGFACE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.mask_token": "mask_token",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
# What transformers calls them in memory, from 5.20 or so, -> in files.
HUGGINGFACE_RENAMED = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.down_proj": "mlp.weights_out",
}


def convert_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An original file under the names of :class:`DINOv2`: its convolution is one of images; its mask token, which only
    pre-training uses, is left out.
    """
    converted = {name: value for name, value in state.items() if name != "mask_token"}
    if "patch_embed.proj.weight" in converted and converted["patch_embed.proj.weight"].ndim == 4:
        converted["patch_embed.proj.weight"] = converted["patch_embed.proj.weight"][:, :, None]
    return converted


def to_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`convert_original`, with a mask token of zeros."""
    converted = dict(state) | {"mask_token": torch.zeros_like(state["cls_token"][0])}
    converted["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :, 0]
    return converted


def convert_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file of transformers' ``Dinov2Model`` or ``Dinov2WithRegistersModel``, or such a model's state dict, under the
    names of :class:`DINOv2`. Unknown names stay, for a strict load to report.
    """
    state = {re.sub(r"^dinov2(_with_registers)?\.", "", name): value for name, value in state.items()}
    state = {_renamed(name, HUGGINGFACE_RENAMED): value for name, value in state.items()}
    for name in [name for name in state if ".mlp.gate_proj." in name]:
        halves = [state.pop(name), state.pop(name.replace("gate_proj", "up_proj"))]
        state[name.replace("gate_proj", "weights_in")] = torch.cat(halves)
    converted = {}
    for name, value in state.items():
        if ".attention.attention.key." in name or ".attention.attention.value." in name:
            continue
        if ".attention.attention.query." in name:
            parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            value = torch.cat([state[part] for part in parts if part in state])
            name = name.replace("attention.attention.query", "attn.qkv")
        name = _renamed(re.sub(r"^encoder\.layer\.", "blocks.", name), HUGGINGFACE_BLOCK | HUGGINGFACE)
        converted[name] = value
    return convert_original(converted)


def to_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`convert_huggingface`, as transformers' files have it, with a mask token of zeros."""
    theirs = {our: their for their, our in (HUGGINGFACE_BLOCK | HUGGINGFACE).items()}
    converted = {}
    for name, value in to_original(state).items():
        if ".attn.qkv." in name:
            for part, matrix in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed = name.replace("attn.qkv", f"attention.attention.{part}")
                converted[re.sub(r"^blocks\.", "encoder.layer.", renamed)] = matrix
        else:
            converted[re.sub(r"^blocks\.", "encoder.layer.", _renamed(name, theirs))] = value
    return converted


def _renamed(name: str, names: dict[str, str]) -> str:
    """The name with its part before ``.weight`` or ``.bias`` replaced; within a block, the part behind its number."""
    block = found[0] if (found := re.match(r"(encoder\.layer|blocks)\.\d+\.", name)) else ""
    inner = name.removeprefix(block)
    kind = next((kind for kind in (".weight", ".bias") if inner.endswith(kind)), "")
    stem = inner.removesuffix(kind)
    return block + names.get(stem, stem) + kind


def published_weights(state: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """The weights of a file in any layout, under the names of :class:`DINOv2`.

    Raises:
        ValueError: if it is no DINOv2.
    """
    converted = convert_huggingface(state) if is_huggingface(state) else convert_original(state)
    missing = {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.ls1.gamma"} - converted.keys()
    if missing:
        raise ValueError(
            f"{path} holds no DINOv2: {min(missing)} is missing among names such as {', '.join(list(state)[:3])}. Give "
            "a backbone of github.com/facebookresearch/dinov2, or a model of transformers of that name."
        )
    return converted


def is_huggingface(state: dict[str, Tensor]) -> bool:
    return any("embeddings.patch_embeddings" in name for name in state)


def from_published(
    path: str | Path, image_size: int = 224, num_frames: int = 16, num_heads: int | None = None
) -> DINOv2:
    """DINOv2 from a file of the original or of transformers; its variant is read off the shapes of the weights.

    Positions are stretched as the code does that the file was written for.

    Args:
        path: see :func:`~blueberry_video.weights.files.read_weights`.
        image_size, num_frames: of the clips; no weight tells them, and any others are taken, too.
        num_heads: no weight tells this either; by default heads have 64 channels, as published ones.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no DINOv2, or one too narrow for heads of 64 channels without ``num_heads``.
    """
    state = weight_files.read_weights(path)
    weights = published_weights(state, path)
    embed_dim, in_channels, _, patch_size = weights["patch_embed.proj.weight"].shape[:4]
    if num_heads is None and embed_dim < 64:
        raise ValueError(f"{path} holds a DINOv2 of width {embed_dim}, too narrow for heads of 64: give num_heads.")
    swiglu = "blocks.0.mlp.w12.weight" in weights
    # 2 / 3 of the ratio's width, rounded up to a multiple of 8, must be the width found
    hidden = weights["blocks.0.mlp.w3.weight"].shape[1] * 1.5 if swiglu else weights["blocks.0.mlp.fc1.weight"].shape[0]
    model = DINOv2(
        image_size=image_size,
        num_frames=num_frames,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=weight_files.num_blocks(weights, "blocks"),
        num_heads=num_heads or embed_dim // 64,
        mlp_ratio=hidden / embed_dim,
        in_channels=in_channels,
        num_registers=weights["register_tokens"].shape[1] if "register_tokens" in weights else 0,
        swiglu=swiglu,
        table_size=math.isqrt(weights["pos_embed"].shape[1] - 1),
        interpolate_offset=0.0 if is_huggingface(state) else None,
        final_norm="norm.weight" in weights,
    )
    load_strictly(model, weights, path)
    return model
