"""The plain video vision transformer: the encoder of VideoMAE (arXiv 2203.12602; github.com/MCG-NJU/VideoMAE), of
VideoMAE V2 and, with a bias on the keys, of OmniMAE (github.com/facebookresearch/omnivore); with other positions, of
V-JEPA (arXiv 2404.08471; github.com/facebookresearch/jepa) and V-JEPA 2 (arXiv 2506.09985).

Unusual about it: VideoMAE's positions are a fixed 1-D sinusoid over the flattened token index; its keys have no bias.
V-JEPA's are a fixed 3-D sine-cosine table, V-JEPA 2 turns queries and keys instead. None are in the state dict; there
is no class token. Parameter names are those of the original code.
"""

import math
import re
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from blueberry_video.models.encoder import Encoder
from blueberry_video.nn.blocks import Block, init_trunc_normal
from blueberry_video.nn.embeddings import TubeletEmbed
from blueberry_video.nn.positions import resize_table, sincos_3d_table, sinusoid_table
from blueberry_video.nn.rope import RotaryPositions
from blueberry_video.weights.files import JEPA_FILE, num_blocks
from blueberry_video.weights.load import load_strictly


class VisionTransformer(Encoder):
    """Encoder of video float (B, C, T, H, W), normalised with ImageNet mean and standard deviation -> tokens (B, N,
    D).

    Args:
        image_size, num_frames, patch_size, tubelet_size, embed_dim, in_channels: see
            :class:`~blueberry_video.models.encoder.Encoder`.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden over outer width of the MLPs.
        qkv_bias: which projections have a bias, see :class:`~blueberry_video.nn.attention.Attention`.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        final_norm: LayerNorm after the last block. Published fine-tuned models have none: their classifier normalises
            the mean of the tokens.
        images: take single frames (B, C, 1, H, W), too; see :class:`~blueberry_video.models.encoder.Encoder`.
        positions: ``"sinusoid"`` over the token index (VideoMAE); ``"sincos_3d"`` (V-JEPA), stretched over clips of
            another length or size; ``"rope_3d"`` (V-JEPA 2), which such clips need nothing for.
        rope_quirk: turn as the published weights of V-JEPA 2 do, see :mod:`blueberry_video.nn.rope`.
        init: ``"xavier"`` (VideoMAE, :func:`init_weights`) or ``"trunc_normal"`` (V-JEPA,
            :func:`~blueberry_video.nn.blocks.init_trunc_normal`).

    Raises:
        ValueError: for sizes the patches do not divide, unknown positions or init; in ``forward`` for a video of a
            shape that these positions do not fit.
    """

    positions: Tensor

    def __init__(
        self,
        image_size: int = 224,
        num_frames: int = 16,
        patch_size: int = 16,
        tubelet_size: int = 2,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        in_channels: int = 3,
        qkv_bias: str = "qv",
        drop_path: float = 0.0,
        final_norm: bool = True,
        images: bool = False,
        positions: str = "sinusoid",
        rope_quirk: bool = False,
        init: str = "xavier",
    ):
        super().__init__(image_size, num_frames, patch_size, tubelet_size, embed_dim, in_channels, images)
        if positions not in ("sinusoid", "sincos_3d", "rope_3d"):
            raise ValueError(f"positions={positions!r} is unknown: choose 'sinusoid', 'sincos_3d' or 'rope_3d'.")
        if init not in ("xavier", "trunc_normal"):
            raise ValueError(f"init={init!r} is unknown: choose 'xavier' or 'trunc_normal'.")
        self.patch_embed = TubeletEmbed(in_channels, embed_dim, self.patch_size)
        self.position_kind, grid = positions, self.grid(self.video_size)
        if positions != "rope_3d":
            sinusoid = positions == "sinusoid"
            table = sinusoid_table(self.num_tokens, embed_dim) if sinusoid else sincos_3d_table(grid, embed_dim)
            self.register_buffer("positions", table, persistent=False)
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, qkv_bias, rate) for rate in rates)
        self.rope = RotaryPositions(grid, embed_dim // num_heads, rope_quirk) if positions == "rope_3d" else None
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6) if final_norm else nn.Identity()
        if init == "xavier":
            self.blocks.apply(init_weights)
        else:
            init_trunc_normal(self)

    def as_clip(self, video: Tensor) -> Tensor:
        """As :meth:`Encoder.as_clip`; with 3-D positions, of any length and size that the patches divide."""
        if self.position_kind == "sinusoid":
            return super().as_clip(video)
        channels, tubelet = self.video_size[0], self.patch_size[0]
        if self.images and video.shape[2] == 1:
            video = video.expand(-1, -1, tubelet, -1, -1)
        whole = all(size and size % patch == 0 for size, patch in zip(video.shape[-3:], self.patch_size))
        if video.shape[1] != channels or not whole:
            raise ValueError(
                f"the video has (C, T, H, W) = {tuple(video.shape[1:])} but the encoder takes {channels} channels and "
                f"cuts T, H, W into patches of {self.patch_size}: give a video of multiples of these."
            )
        return video

    def forward(self, video: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) and, optionally, indices (B, N_kept) of the visible tokens -> (B, N or N_kept, D)."""
        x = self.patch_embed(self.as_clip(video), keep)
        grid, rotation = self.grid(video.shape), None
        if self.rope is not None:
            rotation = self.rope(keep, grid)
        else:
            positions = self._positions(grid)
            x = x + (positions if keep is None else positions[keep])
        for block in self.blocks:
            x = block(x, rotation)
        return self.norm(x)

    def _positions(self, grid: tuple[int, int, int]) -> Tensor:
        """The table (t * h * w, D) of a clip of this grid; a single frame has the places of a clip's first tokens."""
        built = self.grid(self.video_size)
        length = built[0] if grid[0] == 1 and self.images else grid[0]
        return resize_table(self.positions, built, (length, *grid[1:]))[: math.prod(grid)]

    def convert_published(self, state: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
        return encoder_weights(state, source)

    @classmethod
    def from_weights(
        cls,
        weights: dict[str, Tensor],
        source: str | Path,
        num_frames: int = 16,
        image_size: int = 224,
        num_heads: int | None = None,
        images: bool = False,
        positions: str = "sinusoid",
        rope_quirk: bool = False,
    ) -> Self:
        """Builds an encoder of the size of a state dict and loads it strictly.

        Args:
            weights: as :func:`encoder_weights` returns them.
            source: origin of the weights, for error messages.
            num_frames, image_size: size of the clips; positions are computed, so no tensor determines them.
            num_heads: defaults to that of the published model of this width; no tensor determines it.
            images: also accept single frames, as OmniMAE does.
            positions, rope_quirk: see :class:`VisionTransformer`.

        Raises:
            ValueError: a tensor is missing, unexpected or of another shape.
        """
        embed_dim, in_channels, tubelet_size, patch_size = weights["patch_embed.proj.weight"].shape[:4]
        encoder = cls(
            image_size=image_size,
            num_frames=num_frames,
            patch_size=patch_size,
            tubelet_size=tubelet_size,
            embed_dim=embed_dim,
            depth=num_blocks(weights, "blocks"),
            num_heads=num_heads or embed_dim // head_width(embed_dim),
            mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
            in_channels=in_channels,
            qkv_bias=qkv_bias(weights, "blocks.0"),
            final_norm="norm.weight" in weights,
            images=images,
            positions=positions,
            rope_quirk=rope_quirk,
        )
        load_strictly(encoder, weights, source)
        return encoder


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform matrices, zero biases.

    LayerNorm (1, 0), the patch convolution and the q and v biases (0) keep the values they are made with.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# Names within a block: transformers' VideoMAE (from version 5) -> ours, beside query, key and value: one matrix here.
HUGGINGFACE_BLOCK = {
    "attention.attention.query.bias": "attn.q_bias",
    "attention.attention.value.bias": "attn.v_bias",
} | {
    f"{theirs}.{kind}": f"{ours}.{kind}"
    for theirs, ours in (
        ("attention.output.dense", "attn.proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
    )
    for kind in ("weight", "bias")
}


def convert_huggingface_blocks(state: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """Transformer blocks of transformers' VideoMAE, ``<source>.<i>.…``, under the names of this package,
    ``<target>.<i>.…``.

    Query, key and value become one matrix. Keys have no bias; a query or value bias is read by its name in either
    layout (``query.bias`` from transformers 5, ``q_bias`` before). Unknown names stay, for a strict load to report.
    """
    before_5 = {f"attention.attention.{part}_bias": f"attn.{part}_bias" for part in "qv"}
    ours = HUGGINGFACE_BLOCK | before_5 | {"attention.attention.query.weight": "attn.qkv.weight"}
    converted = {}
    for name, value in state.items():
        if not name.startswith(f"{source}.") or name.endswith((".key.weight", ".value.weight")):
            continue
        index, inner = name.removeprefix(f"{source}.").split(".", 1)
        if inner == "attention.attention.query.weight":
            parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            value = torch.cat([state[part] for part in parts if part in state])
        converted[f"{target}.{index}.{ours.get(inner, inner)}"] = value
    return converted


def to_huggingface_blocks(state: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """The inverse of :func:`convert_huggingface_blocks`, in the layout of transformers 5.

    Raises:
        ValueError: if keys have a bias, which transformers' VideoMAE has no place for.
    """
    theirs = {our: their for their, our in HUGGINGFACE_BLOCK.items()}
    converted = {}
    for name, value in state.items():
        if not name.startswith(f"{source}."):
            continue
        index, inner = name.removeprefix(f"{source}.").split(".", 1)
        if inner == "attn.qkv.bias":
            raise ValueError(f"{name} biases the keys, which VideoMAE cannot hold: this model has qkv_bias='qkv'.")
        if inner == "attn.qkv.weight":
            for part, matrix in zip(("query", "key", "value"), value.chunk(3), strict=True):
                converted[f"{target}.{index}.attention.attention.{part}.weight"] = matrix
        else:
            converted[f"{target}.{index}.{theirs.get(inner, inner)}"] = value
    return converted


def convert_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder of transformers' ``VideoMAE…`` models (keys ``videomae.…`` or bare) as :class:`VisionTransformer`."""
    prefix = "videomae." if any(name.startswith("videomae.") for name in state) else ""
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    converted = convert_huggingface_blocks(state, "encoder.layer", "blocks")
    for name, value in state.items():
        if not name.startswith("encoder.layer."):
            name = name.replace("embeddings.patch_embeddings.projection.", "patch_embed.proj.")
            converted[re.sub("^layernorm", "norm", name)] = value
    return converted


def to_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`convert_huggingface`: a :class:`VisionTransformer`'s weights as ``videomae.…``.

    Raises:
        ValueError: if keys have a bias, which transformers' VideoMAE has no place for.
    """
    converted = to_huggingface_blocks(state, "blocks", "videomae.encoder.layer")
    for name, value in state.items():
        if not name.startswith("blocks."):
            name = name.replace("patch_embed.proj.", "embeddings.patch_embeddings.projection.")
            converted[f"videomae.{re.sub('^norm', 'layernorm', name)}"] = value
    return converted


def convert_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder of an original VideoMAE file, or of one of this package, as a :class:`VisionTransformer`'s.

    Pre-training files keep it under ``encoder.``, fine-tuning files at the top, beside ``fc_norm.`` and ``head.``.
    """
    if "encoder.patch_embed.proj.weight" in state:
        return {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    return {name: value for name, value in state.items() if not name.startswith(("fc_norm.", "head."))}


def convert_omnimae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder of an OmniMAE file (keys ``trunk.…``) as a :class:`VisionTransformer`'s.

    The file holds the position table as a buffer. It is left out here, once it has been found to be the one this
    package computes. The convolution has a number of its own there, behind what repeats a picture.

    Raises:
        ValueError: for other positions.
    """
    check_positions(state, "trunk.pos_embed")
    others = ("trunk.decoder.", "trunk.mask_token", "trunk.pos_embed")
    names = [name for name in state if name.startswith("trunk.") and not name.startswith(others)]
    return {re.sub(r"^trunk\.(patch_embed\.proj\.)?(\d\.)?", r"\1", name): state[name] for name in names}


def to_omnimae(state: dict[str, Tensor], num_frames: int = 16, image_size: int = 224) -> dict[str, Tensor]:
    """The inverse of :func:`convert_omnimae`: a :class:`VisionTransformer`'s weights as ``trunk.…``, with positions.

    Args:
        state: the weights of the encoder.
        num_frames, image_size: of its clips, which tell the length of the position table.

    Raises:
        ValueError: if keys have no bias, as in VideoMAE: OmniMAE's have.
    """
    if "blocks.0.attn.qkv.bias" not in state:
        raise ValueError("blocks.0.attn.qkv.bias is missing: OmniMAE's encoder has qkv_bias='qkv', this one has not.")
    width, _, tubelet_size, *patch_size = state["patch_embed.proj.weight"].shape
    num_tokens = num_frames // tubelet_size * math.prod(image_size // size for size in patch_size)
    converted = {"trunk.pos_embed": sinusoid_table(num_tokens, width)[None]}
    for name, value in state.items():
        converted[f"trunk.{name.replace('patch_embed.proj.', 'patch_embed.proj.1.')}"] = value
    return converted


def check_positions(state: dict[str, Tensor], name: str) -> None:
    """A position table in a file, (1, N, D), is the sinusoid of this package; that it is missing does no harm.

    Raises:
        ValueError: if it is another: computed positions would not be those the weights were trained with.
    """
    if name not in state:
        return
    table = state[name]
    expected = sinusoid_table(*table.shape[-2:])
    if table.shape != (1, *expected.shape) or (table.float() - expected).abs().max() > 1e-5:
        raise ValueError(
            f"{name} in the file, {tuple(table.shape)}, is not the 1-D sinusoid over the flattened tokens that this "
            "package computes: learned or other positions cannot be loaded."
        )


def encoder_weights(state: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """The encoder in a published state dict of any layout, under the names of :class:`VisionTransformer`.

    Raises:
        ValueError: if there is no VideoMAE or OmniMAE encoder in it, or one with other positions.
    """
    if any("embeddings.patch_embeddings.proj." in name for name in state):
        raise ValueError(f"{source} holds an encoder and a predictor, {JEPA_FILE}")
    if any("embeddings.patch_embeddings" in name for name in state):
        return convert_huggingface(state)
    is_omnimae = any(name.startswith("trunk.") for name in state)
    converted = convert_omnimae(state) if is_omnimae else convert_original(state)
    if "patch_embed.proj.weight" not in converted:
        raise ValueError(
            f"{source} holds no VideoMAE encoder: patch_embed.proj.weight is missing among names such as "
            f"{', '.join(list(state)[:3])}."
        )
    return converted


def head_width(width: int) -> int:
    """Published models have heads of 64 channels, ViT-H (encoder and VideoMAE's decoder) of 80, ViT-g of 88."""
    return {640: 80, 1280: 80, 1408: 88}.get(width, 64)


def qkv_bias(state: dict[str, Tensor], block: str) -> str:
    """Which projections of a block, such as ``blocks.0``, have a bias: as :class:`VisionTransformer` names it."""
    return "qv" if f"{block}.attn.q_bias" in state else "qkv" if f"{block}.attn.qkv.bias" in state else "none"
