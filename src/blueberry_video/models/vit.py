"""Plain video vision transformer: the encoder of VideoMAE (arXiv 2203.12602; github.com/MCG-NJU/VideoMAE), of VideoMAE
V2 and, with a bias on the keys, of OmniMAE (github.com/facebookresearch/omnivore); with different positions, of V-JEPA
(arXiv 2404.08471; github.com/facebookresearch/jepa) and V-JEPA 2 (arXiv 2506.09985).

VideoMAE has a fixed 1-D sinusoid over the flattened token index and no bias on the keys; V-JEPA has a fixed 3-D
sine-cosine table; V-JEPA 2 has rotary positions. Positions are not in the state dict. There is no class token.
Parameter names are those of the original code.
"""

import math
import re
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from blueberry_video.models.encoder import Encoder
from blueberry_video.nn.blocks import Block, init_trunc_normal
from blueberry_video.nn.embeddings import TubeletEmbed
from blueberry_video.nn.positions import PositionTables, resize_table, sincos_3d_table, sinusoid_table
from blueberry_video.nn.rope import RotaryPositions, Rotation
from blueberry_video.parallel.sequence import TokenShards, active_group
from blueberry_video.weights.diffusers_folder import read_source
from blueberry_video.weights.files import JEPA_FILE, num_blocks
from blueberry_video.weights.load import check_layout, load_strictly, num_heads_of

FIX = "num_frames or image_size of data and model.encoder, or the ratio of the masking"
VIDEOMAE = "the layout of transformers' VideoMAE"
PUBLISHED_HEADS = {384: "6", 768: "12", 1024: "16", 1280: "16", 1408: "16"}  # width of VideoMAE and OmniMAE -> heads


class VisionTransformer(Encoder, PositionTables):
    """Vision transformer: video float (B, C, T, H, W), normalized with ImageNet mean and std -> tokens (B, N, D).

    Args:
        image_size, num_frames, patch_size, tubelet_size, embed_dim, in_channels: see
            :class:`~blueberry_video.models.encoder.Encoder`.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: ratio of the hidden width of the MLPs to ``embed_dim``.
        qkv_bias: projections with a bias, see :class:`~blueberry_video.nn.attention.Attention`.
        drop_path: stochastic depth rate of the last block; rates grow linearly from 0 at the first block.
        final_norm: LayerNorm after the last block. Published fine-tuned models have none: their classifier normalizes
            the mean of the tokens.
        images: also accept single frames, see :class:`~blueberry_video.models.encoder.Encoder`.
        positions: ``"sinusoid"`` over the token index (VideoMAE); ``"learned"``, a parameter per token without weight
            decay (an option of VideoMAE); ``"sincos_3d"`` (V-JEPA), interpolated for clips of
            a different length or size; ``"rope_3d"`` (V-JEPA 2), defined for any length and size.
        rope_quirk: rotation of the published weights of V-JEPA 2, see :mod:`blueberry_video.nn.rope`.
        init: ``"xavier"`` (VideoMAE, :func:`init_weights`) or ``"trunc_normal"`` (V-JEPA,
            :func:`~blueberry_video.nn.blocks.init_trunc_normal`).
        layer_scale: initial factors of the residual branches, see :class:`~blueberry_video.nn.blocks.Block`; 0: none.
        norm_eps: eps of the LayerNorms; 1e-6 in the original code, 1e-12 in the config of folders of transformers'
            VideoMAE.

    Raises:
        ValueError: a size is not a multiple of the patch size, or ``positions`` or ``init`` is unknown; in
            ``forward``, the shape of the video does not fit the positions.
    """

    block_lists: ClassVar[tuple[str, ...]] = ("blocks",)  # sharded one by one
    splits_clips = True  # under sequence_parallel
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
        layer_scale: float = 0.0,
        norm_eps: float = 1e-6,
    ):
        super().__init__(image_size, num_frames, patch_size, tubelet_size, embed_dim, in_channels, images)
        if positions not in ("sinusoid", "learned", "sincos_3d", "rope_3d"):
            raise ValueError(
                f"positions={positions!r} is unknown: choose 'sinusoid', 'learned', 'sincos_3d' or 'rope_3d'."
            )
        if init not in ("xavier", "trunc_normal"):
            raise ValueError(f"init={init!r} is unknown: choose 'xavier' or 'trunc_normal'.")
        self.patch_embed = TubeletEmbed(in_channels, embed_dim, self.patch_size)
        self.num_heads, self.position_kind, grid = num_heads, positions, self.grid(self.video_size)
        self.norm_eps = norm_eps
        self.register_tables()
        self.pos_embed: nn.Parameter | None = None
        if positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, self.num_tokens, embed_dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
            self.no_weight_decay = ("pos_embed",)
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        sizes = (embed_dim, num_heads, mlp_ratio, qkv_bias)
        self.blocks = nn.ModuleList(Block(*sizes, rate, norm_eps, layer_scale) for rate in rates)
        self.rope = RotaryPositions(grid, embed_dim // num_heads, rope_quirk) if positions == "rope_3d" else None
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps) if final_norm else nn.Identity()
        if init == "xavier":
            self.blocks.apply(init_weights)
        else:
            init_trunc_normal(self)

    def tables(self) -> dict[str, Tensor]:
        if self.position_kind in ("rope_3d", "learned"):
            return {}
        if self.position_kind == "sinusoid":
            return {"positions": sinusoid_table(self.num_tokens, self.embed_dim)}
        return {"positions": sincos_3d_table(self.grid(self.video_size), self.embed_dim)}

    def as_clip(self, video: Tensor) -> Tensor:
        """See :meth:`Encoder.as_clip`; with 3-D positions, T, H and W are any multiples of the patch size."""
        if self.position_kind in ("sinusoid", "learned"):
            return super().as_clip(video)
        channels, tubelet = self.video_size[0], self.patch_size[0]
        if self.images and video.shape[2] == 1:
            video = video.expand(-1, -1, tubelet, -1, -1)
        whole = all(size and size % patch == 0 for size, patch in zip(video.shape[-3:], self.patch_size))
        if video.shape[1] != channels or not whole:
            raise ValueError(
                f"the video has (C, T, H, W) = {tuple(video.shape[1:])}, but the encoder requires C = {channels} and "
                f"multiples of patch_size={self.patch_size} as T, H and W."
            )
        return video

    def forward(self, video: Tensor, keep: Tensor | None = None) -> Tensor:
        """Encodes all tokens, or the visible ones ``keep`` (B, N_kept): (B, C, T, H, W) -> (B, N or N_kept, D).

        Under :func:`~blueberry_video.parallel.sequence.sequence_parallel`, the tokens are split over the group.
        """
        grid, rotation, shards = self.grid(video.shape), None, None
        if (group := active_group()) is not None:
            tokens = math.prod(grid) if keep is None else keep.shape[1]
            assert self.num_heads is not None
            shards = TokenShards(group, 1, tokens, self.num_heads, "model.encoder.num_heads", FIX)
            keep = None if keep is None else shards.own(keep)
        x = self.patch_embed(self.as_clip(video), keep)
        if self.rope is not None:
            rotation = self.rope(keep, grid)
        else:
            positions = self._positions(grid)
            x = x + (positions if keep is None else positions[keep])
        if shards is not None and keep is None:
            x = shards.own(x)
            rotation = None if rotation is None else Rotation(*(shards.own(part, 0) for part in rotation))
        for block in self.blocks:
            x = block(x, rotation, shards)
        x = self.norm(x)
        return x if shards is None else shards.gather(x)

    def _positions(self, grid: tuple[int, int, int]) -> Tensor:
        """Position table (t * h * w, D) of a clip of this grid; a single frame has the first positions of a clip."""
        if self.pos_embed is not None:
            return self.pos_embed[0, : math.prod(grid)]
        built = self.grid(self.video_size)
        length = built[0] if grid[0] == 1 and self.images else grid[0]
        return resize_table(self.positions, built, (length, *grid[1:]))[: math.prod(grid)]

    def convert_published(self, state: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
        return encoder_weights(state, source)

    @classmethod
    def from_published(
        cls,
        weights: str | Path,
        num_frames: int | None = None,
        image_size: int | None = None,
        num_heads: int | None = None,
    ) -> Self:
        """Builds the encoder of a VideoMAE, VideoMAE V2 or OmniMAE, pre-trained or fine-tuned, of the size of published
        weights.

        Args:
            weights: a file in the original layout or in that of transformers, a folder in the layout of transformers
                (``VideoMAEModel``, ``VideoMAEForPreTraining`` or ``VideoMAEForVideoClassification``), or weights on a
                hub, see :func:`~blueberry_video.weights.files.resolve`.
            num_frames, image_size, num_heads: see :func:`settings_of_config`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the weights are of a different architecture, or the number of heads is unknown.
        """
        config, state = read_source(weights)
        tensors = encoder_weights(state, weights)
        settings = settings_of_config(config, tensors, weights, num_frames, image_size, num_heads)
        return cls.from_weights(tensors, weights, **settings, images=any(name.startswith("trunk.") for name in state))

    @classmethod
    def from_weights(
        cls,
        weights: dict[str, Tensor],
        source: str | Path,
        num_heads: int,
        num_frames: int = 16,
        image_size: int = 224,
        images: bool = False,
        positions: str = "sinusoid",
        rope_quirk: bool = False,
        norm_eps: float = 1e-6,
    ) -> Self:
        """Builds an encoder of the size of a state dict and loads it strictly.

        Args:
            weights: as :func:`encoder_weights` returns them.
            source: origin of the weights, for error messages.
            num_heads, num_frames, image_size: heads and size of the clips, which no tensor determines.
            images, positions, rope_quirk, norm_eps: see :class:`VisionTransformer`.

        Raises:
            ValueError: a tensor is missing, unexpected or of a different shape.
        """
        embed_dim, in_channels, tubelet_size, patch_size = weights["patch_embed.proj.weight"].shape[:4]
        encoder = cls(
            image_size=image_size,
            num_frames=num_frames,
            patch_size=patch_size,
            tubelet_size=tubelet_size,
            embed_dim=embed_dim,
            depth=num_blocks(weights, "blocks"),
            num_heads=num_heads,
            mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
            in_channels=in_channels,
            qkv_bias=qkv_bias(weights, "blocks.0"),
            final_norm="norm.weight" in weights,
            images=images,
            positions="learned" if "pos_embed" in weights else positions,
            rope_quirk=rope_quirk,
            layer_scale=1.0 if "blocks.0.gamma_1" in weights else 0.0,
            norm_eps=norm_eps,
        )
        load_strictly(encoder, weights, source)
        return encoder


def init_weights(module: nn.Module) -> None:
    """Initializes a linear layer: Xavier-uniform weight, zero bias.

    LayerNorm (1, 0), the patch convolution and the q and v biases (0) keep the initialization of PyTorch.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# Names within a block: transformers' VideoMAE (from version 5) -> ours; query, key and value are one matrix here.
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
    """Converts blocks of transformers' VideoMAE, ``<source>.<i>.…``, to the names of this package, ``<target>.<i>.…``.

    Query, key and value become one matrix. Biases have the names of transformers 5 (``query.bias``) or earlier
    (``q_bias``). Unknown names are kept, so that a strict load reports them.
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
    """Inverse of :func:`convert_huggingface_blocks`, in the layout of transformers 5.

    Raises:
        ValueError: the keys have a bias, which transformers' VideoMAE does not support.
    """
    theirs = {our: their for their, our in HUGGINGFACE_BLOCK.items()}
    converted = {}
    for name, value in state.items():
        if not name.startswith(f"{source}."):
            continue
        index, inner = name.removeprefix(f"{source}.").split(".", 1)
        if inner == "attn.qkv.bias":
            raise ValueError(f"{name} has no counterpart in {VIDEOMAE}: qkv_bias='qkv' must be 'qv' or 'none'.")
        if inner == "attn.qkv.weight":
            for part, matrix in zip(("query", "key", "value"), value.chunk(3), strict=True):
                converted[f"{target}.{index}.attention.attention.{part}.weight"] = matrix.clone()
        else:
            converted[f"{target}.{index}.{theirs.get(inner, inner)}"] = value
    return converted


def convert_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts the encoder of transformers' ``VideoMAE…`` models (``videomae.…`` or without this prefix)."""
    prefix = "videomae." if any(name.startswith("videomae.") for name in state) else ""
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    converted = convert_huggingface_blocks(state, "encoder.layer", "blocks")
    for name, value in state.items():
        if not name.startswith("encoder.layer."):
            name = name.replace("embeddings.patch_embeddings.projection.", "patch_embed.proj.")
            converted[re.sub("^layernorm", "norm", name)] = value
    return converted


def to_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of :func:`convert_huggingface`, with the prefix ``videomae.``.

    Raises:
        ValueError: see :func:`to_huggingface_blocks`.
    """
    converted = to_huggingface_blocks(state, "blocks", "videomae.encoder.layer")
    for name, value in state.items():
        if not name.startswith("blocks."):
            name = name.replace("patch_embed.proj.", "embeddings.patch_embeddings.projection.")
            converted[f"videomae.{re.sub('^norm', 'layernorm', name)}"] = value
    return converted


def huggingface_config(encoder: Encoder) -> dict[str, Any]:
    """Settings of an encoder as ``config.json`` of transformers' VideoMAE holds them.

    Settings of training alone (``drop_path``, ``init``) are left out.

    Raises:
        ValueError: a setting has no counterpart in VideoMAE; the message names key and value.
    """
    check_layout(VIDEOMAE, {"model.encoder": (type(encoder).__name__, VisionTransformer.__name__)})
    assert isinstance(encoder, VisionTransformer)
    state, (channels, num_frames, image_size, _) = encoder.state_dict(), encoder.video_size
    bias = qkv_bias(state, "blocks.0")
    settings = {"positions": (encoder.position_kind, "sinusoid"), "images": (encoder.images, False)}
    settings |= {"qkv_bias": (bias, bias if bias == "none" else "qv")}
    settings |= {"layer_scale": ("blocks.0.gamma_1" in state, False)}
    check_layout(VIDEOMAE, {f"model.encoder.{key}": values for key, values in settings.items()})
    return {
        "model_type": "videomae",
        "image_size": image_size,
        "patch_size": encoder.patch_size[1],
        "num_channels": channels,
        "num_frames": num_frames,
        "tubelet_size": encoder.patch_size[0],
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": encoder.num_heads,
        "intermediate_size": len(state["blocks.0.mlp.fc1.bias"]),
        "hidden_act": "gelu",
        "layer_norm_eps": encoder.norm_eps,
        "qv_bias": bias == "qv",
        "use_mean_pooling": "norm.weight" not in state,  # transformers' name for "no LayerNorm after the encoder"
    }


def settings_of_config(
    config: dict[str, Any],
    weights: dict[str, Tensor],
    source: str | Path,
    num_frames: int | None,
    image_size: int | None,
    num_heads: int | None,
) -> dict[str, Any]:
    """Arguments of :meth:`VisionTransformer.from_weights` that no tensor determines.

    The number of heads is that of ``config.json`` of transformers' VideoMAE, or the given one. The size of the clips is
    the given one, else that of the config, else 16 frames of 224 pixels, that of all published models.

    Args:
        config: empty if there is none.
        weights: tensors of the encoder, as :func:`encoder_weights` returns them.
        source: origin of the weights, for error messages.
        num_frames, image_size, num_heads: the given values, or ``None``.

    Raises:
        ValueError: the number of heads is unknown or contradicts the config, or the config has a setting that no
            published model has.
    """
    size = config.get("image_size", 224)
    height, width = size if isinstance(size, list) else (size, size)
    for key, value, required in (
        ("image_size", [height, width], [height, height]),
        ("hidden_act", config.get("hidden_act", "gelu"), "gelu"),
    ):
        if value != required:
            raise ValueError(f"{key}={value!r} in config.json is not supported: it must be {required!r}.")
    return {
        "num_frames": num_frames or config.get("num_frames", 16),
        "image_size": image_size or height,
        "num_heads": num_heads_of(config, num_heads, len(weights["patch_embed.proj.weight"]), source, PUBLISHED_HEADS),
        "norm_eps": config.get("layer_norm_eps", 1e-6),
    }


def convert_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Extracts the encoder of an original VideoMAE file, or of a file of this package.

    Its names begin with ``encoder.`` in pre-training files; in fine-tuning files they have no prefix.
    """
    if "encoder.patch_embed.proj.weight" in state:
        return {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    return {name: value for name, value in state.items() if not name.startswith(("fc_norm.", "head."))}


def convert_omnimae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts the encoder of an OmniMAE file (keys ``trunk.…``).

    The position table in the file is compared with the computed one and dropped. The convolution is item 1 of a
    sequence in the file, after the module that repeats an image.

    Raises:
        ValueError: see :func:`check_positions`.
    """
    check_positions(state, "trunk.pos_embed")
    ignored = ("trunk.decoder.", "trunk.mask_token", "trunk.pos_embed")
    names = [name for name in state if name.startswith("trunk.") and not name.startswith(ignored)]
    return {re.sub(r"^trunk\.(patch_embed\.proj\.)?(\d\.)?", r"\1", name): state[name] for name in names}


def to_omnimae(state: dict[str, Tensor], num_frames: int = 16, image_size: int = 224) -> dict[str, Tensor]:
    """Inverse of :func:`convert_omnimae`, with the position table.

    Args:
        state: state dict of the encoder.
        num_frames, image_size: size of the clips, which determines the length of the position table.

    Raises:
        ValueError: the keys have no bias.
    """
    if "blocks.0.attn.qkv.bias" not in state:
        raise ValueError("blocks.0.attn.qkv.bias is missing: the layout of OmniMAE requires qkv_bias='qkv'.")
    width, _, tubelet_size, *patch_size = state["patch_embed.proj.weight"].shape
    num_tokens = num_frames // tubelet_size * math.prod(image_size // size for size in patch_size)
    converted = {"trunk.pos_embed": sinusoid_table(num_tokens, width)[None]}
    for name, value in state.items():
        converted[f"trunk.{name.replace('patch_embed.proj.', 'patch_embed.proj.1.')}"] = value
    return converted


def check_positions(state: dict[str, Tensor], name: str) -> None:
    """Checks that a position table (1, N, D) in a state dict, if present, is the sinusoid that this package computes.

    Raises:
        ValueError: the table differs, so that the weights were trained with different positions.
    """
    if name not in state:
        return
    table = state[name]
    expected = sinusoid_table(*table.shape[-2:])
    if table.shape != (1, *expected.shape) or (table.float() - expected).abs().max() > 1e-5:
        raise ValueError(
            f"{name} of shape {tuple(table.shape)} is not the 1-D sinusoid over the flattened tokens: learned or "
            "different positions cannot be loaded."
        )


def encoder_weights(state: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Extracts the encoder of a published state dict in any layout, under the names of :class:`VisionTransformer`.

    Raises:
        ValueError: there is no VideoMAE or OmniMAE encoder, or its positions differ (:func:`check_positions`).
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


def qkv_bias(state: dict[str, Tensor], block: str) -> str:
    """Value of ``qkv_bias`` of :class:`VisionTransformer` for a block of a state dict, such as ``blocks.0``."""
    return "qv" if f"{block}.attn.q_bias" in state else "qkv" if f"{block}.attn.qkv.bias" in state else "none"
