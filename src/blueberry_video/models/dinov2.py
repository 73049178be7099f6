"""DINOv2: image vision transformer, pre-trained without labels (arXiv 2304.07193; github.com/facebookresearch/dinov2),
with or without registers (arXiv 2309.16588). Parameter names are those of the original code.

A class token and optional register tokens are prepended to the patches; every residual branch has a LayerScale; ViT-g
has a gated MLP (SwiGLU). Positions are a learned table of 37 x 37 patches, interpolated bicubically for other image
sizes. The interpolation is part of the model: without registers, the original scales by (patches + 0.1) / 37; with
registers, to the exact size and with antialiasing. transformers always scales to the exact size.

The frames of a video are encoded independently.
"""

import math
import re
from pathlib import Path
from typing import Any, ClassVar, Self

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
from blueberry_video.weights.diffusers_folder import TRANSFORMERS, read_source, write_folder
from blueberry_video.weights.files import num_blocks
from blueberry_video.weights.load import check_layout, different_settings, load_strictly, num_heads_of

PUBLISHED_HEADS = {384: "6", 768: "12", 1024: "16", 1536: "24"}  # width -> heads
CONSTANTS = {"hidden_act": "gelu", "layer_norm_eps": 1e-6}  # the same in all published configs


class DINOv2(Encoder):
    """DINOv2: video float (B, C, T, H, W), normalized with ImageNet mean and std -> tokens (B, N, D) of the patches.

    T is any number from 1; H and W are any multiples of ``patch_size``.

    Args:
        image_size, num_frames, patch_size, embed_dim, in_channels: see :class:`.encoder.Encoder`.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: ratio of the hidden width of the MLPs to ``embed_dim``; a gated MLP has two thirds of that width,
            rounded up to a multiple of 8.
        num_registers: number of register tokens.
        swiglu: gated MLPs, as in ViT-g.
        table_size: height and width of the position table in patches; 37 in published models.
        interpolate_offset: added to the number of patches for the interpolation of the table. ``None``: as in the
            original, 0.1 without registers and 0 with them. It is 0 in transformers.
        interpolate_antialias: interpolate with antialiasing. ``None``: as in the original, only with registers.
        layer_scale_init: initial LayerScale.
        drop_path: stochastic depth rate of all blocks, as in the original.
        final_norm: LayerNorm after the last block.
        weights: published weights of this size to load, see :meth:`load_published`.

    Raises:
        ValueError: a size is not a multiple of the patch size or the number of heads, ``table_size`` is below 1 or
            ``num_registers`` negative; in ``forward``, the shape of the video or ``keep`` (see
            :class:`~blueberry_video.nn.kept_tokens.KeptTokens`) is invalid.
    """

    block_lists: ClassVar[tuple[str, ...]] = ("blocks",)  # sharded one by one
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
            raise ValueError(
                f"table_size={table_size} must be at least 1, and num_registers={num_registers} at least 0."
            )
        original_offset = 0.0 if num_registers else 0.1
        self.offset = original_offset if interpolate_offset is None else interpolate_offset
        self.antialias = num_registers > 0 if interpolate_antialias is None else interpolate_antialias
        self.num_heads, self.table_size, self.swiglu = num_heads, table_size, swiglu
        self.layer_scale_init, self.drop_path = layer_scale_init, drop_path
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
        """Initializes matrices and positions truncated-normal (std 0.02), class and register tokens normal (std 1e-6),
        biases 0. The patch convolution and the norms keep the initialization of PyTorch.
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
        """Checks that a video has frames, the right number of channels, and H and W in whole patches."""
        channels, patch = self.video_size[0], self.patch_size[1]
        shape = f"the video has (B, C, T, H, W) = {tuple(video.shape)}, but the encoder requires"
        if video.ndim != 5 or video.shape[1] != channels or not video.shape[2]:
            raise ValueError(
                f"{shape} five dimensions, C = {channels} and T of at least 1: pass a video with frames, and set "
                "model.encoder.in_channels to its number of channels."
            )
        if any(not size or size % patch for size in video.shape[3:]):
            height, width = (max(round(size / patch), 1) * patch for size in video.shape[3:])
            raise ValueError(f"{shape} multiples of {patch} as H and W: resize it to {height} x {width}.")
        return video

    def forward(self, video: Tensor, keep: Tensor | None = None) -> Tensor:
        """Encodes all tokens, or the visible ones ``keep`` (B, N_kept): (B, C, T, H, W) -> (B, N or N_kept, D)."""
        clip = self.as_clip(video)
        if keep is not None:
            kept = KeptTokens(keep, len(clip), self.grid(clip.shape))
            return kept.pick(kept.encode(clip, self._patches))
        frames = rearrange(clip, "b c t h w -> (b t) c 1 h w")
        return rearrange(self._patches(frames, None), "(b t) n d -> b (t n) d", b=len(clip))

    def tokens_behind(self, frames: Tensor, depths: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        """Returns the outputs of several blocks, normalized by the final norm: the input of depth decoders.

        Args:
            frames: single frames (B, C, 1, H, W).
            depths: ascending indices of blocks, such as (2, 5, 8, 11).

        Returns:
            For each block, the tokens of the patches (B, S, D) and the class token (B, D).

        Raises:
            ValueError: ``depths`` are not ascending indices of blocks, or T is not 1.
        """
        last = len(self.blocks) - 1
        if frames.shape[2] != 1 or list(depths) != sorted(set(depths)) or not set(depths) <= {*range(last + 1)}:
            raise ValueError(
                f"depths={depths} must be ascending indices from 0 to {last}, and T={frames.shape[2]} must be 1: fold "
                "the frames of a video into the batch."
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
        """Number of tokens prepended to the patches."""
        return 1 + (0 if self.register_tokens is None else self.register_tokens.shape[1])

    def _patches(self, frames: Tensor, keep: Tensor | None) -> Tensor:
        """Encodes single frames (B, C, 1, H, W), all patches or the visible ones (B, n) -> (B, S or n, D)."""
        x = self._embed(frames, keep)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, self._prefix :])

    def _embed(self, frames: Tensor, keep: Tensor | None) -> Tensor:
        """Class token, registers and patches, (B, prefix + S, D); registers have no position."""
        x, (_, h, w) = self.patch_embed(frames, keep), self.grid(frames.shape)
        positions = self._positions(h, w)
        x = x + (positions if keep is None else positions[keep])
        prefix = [self.cls_token + self.pos_embed[:, :1]]
        prefix += [] if self.register_tokens is None else [self.register_tokens]
        return torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], dim=1)

    def _positions(self, h: int, w: int) -> Tensor:
        """Positions (h * w, D) of an image of h x w patches."""
        side, table = self.table_size, self.pos_embed[0, 1:]
        if (h, w) == (side, side):
            return table
        image = rearrange(table.float(), "(h w) d -> 1 d h w", h=side)  # half precision would shift it
        if self.offset:
            scales = ((h + self.offset) / side, (w + self.offset) / side)
            image = F.interpolate(image, scale_factor=scales, mode="bicubic", antialias=self.antialias)
        else:
            image = F.interpolate(image, size=(h, w), mode="bicubic", antialias=self.antialias)
        return rearrange(image, "1 d h w -> (h w) d").to(table.dtype)

    def convert_published(self, state: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
        return published_weights(state, source)

    @classmethod
    def from_published(
        cls, weights: str | Path, image_size: int = 224, num_frames: int = 16, num_heads: int | None = None
    ) -> Self:
        """Builds a DINOv2 of the size of published weights.

        Positions are interpolated as by the library of the layout, the original or transformers.

        Args:
            weights: a file in the layout of the original or of transformers, a folder in the layout of transformers, or
                a hub id, see :func:`~blueberry_video.weights.diffusers_folder.read_source`.
            image_size, num_frames: nominal size of the clips; any is accepted. They are not read from a folder's
                ``config.json``, where ``image_size`` is that of the position table.
            num_heads: that in the folder's ``config.json``; required for weights without one.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the weights are not those of a DINOv2, the number of heads is unknown or contradicts the config,
                or the config has a setting that no published model has.
        """
        config, state = read_source(weights)
        return cls.from_state(config, state, weights, image_size, num_frames, num_heads)

    @classmethod
    def from_state(
        cls,
        config: dict[str, Any],
        state: dict[str, Tensor],
        source: str | Path,
        image_size: int = 224,
        num_frames: int = 16,
        num_heads: int | None = None,
    ) -> Self:
        """:meth:`from_published` of a config, which may be empty, and a state dict that were read from ``source``."""
        weights = published_weights(state, source)
        embed_dim, in_channels, _, patch_size = weights["patch_embed.proj.weight"].shape[:4]
        num_heads = num_heads_of(config, num_heads, embed_dim, source, PUBLISHED_HEADS)
        check_config(config, source)
        swiglu = "blocks.0.mlp.w12.weight" in weights
        # 2 / 3 of the ratio's width, rounded up to a multiple of 8, must be the width found
        hidden = weights["blocks.0.mlp.w3.weight"].shape[1] * 1.5 if swiglu else len(weights["blocks.0.mlp.fc1.weight"])
        model = cls(
            image_size=image_size,
            num_frames=num_frames,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=num_blocks(weights, "blocks"),
            num_heads=num_heads,
            mlp_ratio=hidden / embed_dim,
            in_channels=in_channels,
            num_registers=weights["register_tokens"].shape[1] if "register_tokens" in weights else 0,
            swiglu=swiglu,
            table_size=math.isqrt(weights["pos_embed"].shape[1] - 1),
            interpolate_offset=0.0 if is_huggingface(state) else None,
            final_norm="norm.weight" in weights,
        )
        load_strictly(model, weights, source)
        return model

    def save_published(self, folder: str | Path) -> None:
        """Writes a folder that ``from_pretrained`` of transformers' ``Dinov2Model`` or ``Dinov2WithRegistersModel``
        loads.

        Raises:
            FileExistsError: the folder exists and is not empty.
            ValueError: a setting has no counterpart in transformers, such as the original's ``interpolate_offset`` of
                0.1; the message names key and value.
        """
        write_folder(folder, self.config(), to_huggingface(self.state_dict()), stem=TRANSFORMERS)

    def config(self) -> dict[str, Any]:
        """Settings of this model as ``config.json`` of transformers holds them.

        Raises:
            ValueError: see :meth:`save_published`.
        """
        state, registers, dim = self.state_dict(), self._prefix - 1, self.embed_dim
        hidden = state["blocks.0.mlp.w3.weight" if self.swiglu else "blocks.0.mlp.fc2.weight"].shape[1]
        width, ratio = (_swiglu_width, hidden * 1.5 / dim) if self.swiglu else (int, hidden / dim)
        nearest = {math.floor(ratio), math.ceil(ratio)}
        mlp_ratio = next((whole for whole in nearest if width(whole * dim) == hidden), None)  # must be an integer there
        settings: dict[str, tuple[Any, Any]] = {
            "interpolate_offset": (self.offset, 0.0),
            "interpolate_antialias": (self.antialias, registers > 0),
            "final_norm": ("norm.weight" in state, True),
            "mlp_ratio": (ratio, round(ratio) if mlp_ratio is None else ratio),
        }
        name = "Dinov2WithRegistersModel" if registers else "Dinov2Model"
        check_layout(
            f"the layout of transformers' {name}", {f"model.encoder.{key}": pair for key, pair in settings.items()}
        )
        config = {
            "architectures": [name],
            "model_type": "dinov2_with_registers" if registers else "dinov2",
            "image_size": self.table_size * self.patch_size[1],
            "patch_size": self.patch_size[1],
            "num_channels": self.video_size[0],
            "hidden_size": dim,
            "num_hidden_layers": len(self.blocks),
            "num_attention_heads": self.num_heads,
            "mlp_ratio": mlp_ratio,
            "qkv_bias": True,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "layerscale_value": self.layer_scale_init,
            "drop_path_rate": self.drop_path,
            "use_swiglu_ffn": self.swiglu,
        }
        return config | ({"num_register_tokens": registers} if registers else {})


class DINOv2Block(nn.Module):
    """Pre-norm transformer block with LayerScale on both branches. (B, N, D) -> (B, N, D)."""

    def __init__(
        self, dim: int, num_heads: int, hidden_dim: int, swiglu: bool, layer_scale_init: float, drop_path: float
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim, layer_scale_init)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim, _swiglu_width(hidden_dim)) if swiglu else Mlp(dim, hidden_dim)
        self.ls2 = LayerScale(dim, layer_scale_init)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class LayerScale(nn.Module):
    """Learned scale per channel. (…, D) -> (…, D)."""

    def __init__(self, dim: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class SwiGLU(nn.Module):
    """Gated MLP (arXiv 2002.05202): SiLU of the first half times the second half. (…, D) -> (…, D)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def _swiglu_width(hidden_dim: int) -> int:
    """Hidden width of a gated MLP: two thirds of ``hidden_dim``, rounded up to a multiple of 8."""
    return (int(hidden_dim * 2 / 3) + 7) // 8 * 8


# ---- published weights -----------------------------------------------------------------------------------------------

# Names in transformers' files -> ours, within a block; query, key and value are one matrix here.
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
# Names of transformers in memory, from about 5.20 -> in files.
HUGGINGFACE_RENAMED = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.down_proj": "mlp.weights_out",
}


def convert_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts an original state dict: the 2-D patch convolution becomes 3-D; the mask token, which only pre-training
    uses, is dropped.
    """
    converted = {name: value for name, value in state.items() if name != "mask_token"}
    if "patch_embed.proj.weight" in converted and converted["patch_embed.proj.weight"].ndim == 4:
        converted["patch_embed.proj.weight"] = converted["patch_embed.proj.weight"][:, :, None]
    return converted


def to_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of :func:`convert_original`, with a mask token of zeros."""
    converted = dict(state) | {"mask_token": torch.zeros_like(state["cls_token"][0])}
    converted["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :, 0]
    return converted


def convert_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts a file or state dict of transformers' ``Dinov2Model`` or ``Dinov2WithRegistersModel``.

    Unknown names are kept, so that a strict load reports them.
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
    """Inverse of :func:`convert_huggingface`, in the layout of transformers' files, with a mask token of zeros."""
    theirs = {our: their for their, our in (HUGGINGFACE_BLOCK | HUGGINGFACE).items()}
    converted = {}
    for name, value in to_original(state).items():
        if ".attn.qkv." in name:
            for part, matrix in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed = name.replace("attn.qkv", f"attention.attention.{part}")
                converted[re.sub(r"^blocks\.", "encoder.layer.", renamed)] = matrix.clone()
        else:
            converted[re.sub(r"^blocks\.", "encoder.layer.", _renamed(name, theirs))] = value
    return converted


def _renamed(name: str, names: dict[str, str]) -> str:
    """Replaces the part of a name between the index of its block, if any, and ``.weight`` or ``.bias``."""
    block = found[0] if (found := re.match(r"(encoder\.layer|blocks)\.\d+\.", name)) else ""
    inner = name.removeprefix(block)
    kind = next((kind for kind in (".weight", ".bias") if inner.endswith(kind)), "")
    stem = inner.removesuffix(kind)
    return block + names.get(stem, stem) + kind


def published_weights(state: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Converts a state dict in any layout to the names of :class:`DINOv2`.

    Raises:
        ValueError: it is not that of a DINOv2.
    """
    converted = convert_huggingface(state) if is_huggingface(state) else convert_original(state)
    missing = {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.ls1.gamma"} - converted.keys()
    if missing:
        raise ValueError(
            f"{path} holds no DINOv2: {min(missing)} is missing among names such as {', '.join(list(state)[:3])}. Use "
            "a backbone of github.com/facebookresearch/dinov2, or a Dinov2 model of transformers."
        )
    return converted


def check_config(config: dict[str, Any], source: str | Path) -> None:
    """Raises ``ValueError`` if a config of transformers has a setting that no published DINOv2 has."""
    if found := different_settings({key: config[key] for key in CONSTANTS if key in config}, CONSTANTS):
        raise ValueError(f"{source}: its config.json has settings that no published DINOv2 has: {found}.")


def is_huggingface(state: dict[str, Tensor]) -> bool:
    return any("embeddings.patch_embeddings" in name for name in state)
