"""Conversion of CogVideoX weights and settings from SAT (SwissArmyTransformer; github.com/THUDM/CogVideo) to the names
of diffusers, which this package uses.
"""

import re
from typing import Any

import torch
from torch import Tensor

from blueberry_video.models.cogvideox.positions import read_sincos
from blueberry_video.weights.files import num_blocks

SAT = (  # prefixes of names in SAT and in diffusers, except those of blocks and of the norms of heads
    ("time_embed.0.", "time_embedding.linear_1."),
    ("time_embed.2.", "time_embedding.linear_2."),
    ("ofs_embed.0.", "ofs_embedding.linear_1."),
    ("ofs_embed.2.", "ofs_embedding.linear_2."),
    ("mixins.patch_embed.", "patch_embed."),
    ("mixins.pos_embed.pos_embedding", "patch_embed.pos_embedding"),
    ("mixins.final_layer.norm_final.", "norm_out.norm."),
    ("mixins.final_layer.adaLN_modulation.1.", "norm_out.linear."),
    ("mixins.final_layer.linear.", "proj_out."),
    ("transformer.final_layernorm.", "norm_final."),
)
SAT_BLOCK = {  # names within a block
    "input_layernorm": "norm1.norm",
    "post_attention_layernorm": "norm2.norm",
    "attention.dense": "attn1.to_out.0",
    "mlp.dense_h_to_4h": "ff.net.0.proj",
    "mlp.dense_4h_to_h": "ff.net.2",
}
# Computed tables, and embeddings of SAT's language models that CogVideoX does not use.
SAT_UNUSED = re.compile(r"mixins\.pos_embed\.freqs_|transformer\.(word|position)_embeddings\.|.*embed_tokens")


def convert_sat(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts the weights of an original file, ``mp_rank_00_model_states.pt``, to the names of
    :class:`~blueberry_video.models.cogvideox.CogVideoX`.

    The modulation of a block has twelve parts: attention and MLP of the video, then of the text. Query, key and value
    are one matrix. Unknown names are kept, so that a strict load reports them.

    Args:
        state: tensors by name, with or without the prefix ``model.diffusion_model.``.
    """
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        name = re.sub(r"^(model\.)?(diffusion_model\.)?", "", name)
        if SAT_UNUSED.match(name):
            continue
        if match := re.fullmatch(r"mixins\.adaln_layer\.adaLN_modulations\.(\d+)\.1\.(\w+)", name):
            block, kind = match.groups()
            video1, video2, text1, text2 = value.chunk(4)
            converted[f"transformer_blocks.{block}.norm1.linear.{kind}"] = torch.cat([video1, text1])
            converted[f"transformer_blocks.{block}.norm2.linear.{kind}"] = torch.cat([video2, text2])
        elif match := re.fullmatch(r"mixins\.adaln_layer\.(query|key)_layernorm_list\.(\d+)\.(\w+)", name):
            part, block, kind = match.groups()
            converted[f"transformer_blocks.{block}.attn1.norm_{part[0]}.{kind}"] = value
        elif match := re.fullmatch(r"transformer\.layers\.(\d+)\.(.+)\.(\w+)", name):
            block, inner, kind = match.groups()
            if inner == "attention.query_key_value":
                for part, matrix in zip("qkv", value.chunk(3), strict=True):
                    converted[f"transformer_blocks.{block}.attn1.to_{part}.{kind}"] = matrix
            else:
                converted[f"transformer_blocks.{block}.{SAT_BLOCK.get(inner, inner)}.{kind}"] = value
        else:
            ours = next((new + name.removeprefix(old) for old, new in SAT if name.startswith(old)), name)
            converted[ours] = value
    return converted


# Settings of SAT's code in which diffusers' differs: eps of the last norm (dit_video_concat.py, FinalLayerMixin), and
# the part of the rotary table that a clip of another size has (Rotary3DPositionEmbeddingMixin).
SAT_CONFIG = {"norm_out_eps": 1e-6, "rotary_grid": "crop"}

PUBLISHED_SETTINGS = {  # entries of diffusers' config that are equal in all published models
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
    "temporal_compression_ratio": 4,
    "temporal_interpolation_scale": 1.0,
    "timestep_activation_fn": "silu",
}
# Constructor arguments that no tensor shape determines.
FREE_SETTINGS = ("text_len", "num_frames", "height", "width", "spatial_scale", "rotary_grid", "causal_chunk")


def settings_of(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of ``CogVideoX``: sizes from the shapes of a state dict, ``FREE_SETTINGS`` from a config.

    The shape of a linear patch embedding determines only the number of pixels of a patch: the patch size is taken from
    ``config``, or is that of CogVideoX 1.5. Without a config, positions are rotary in 1.5 and in models wider than 2B.
    SAT saves a position table of 2B, too: without image channels it is the frozen sine-cosine embedding, and determines
    the settings of ``"sincos"``.

    Raises:
        KeyError: a tensor is missing.
        ValueError: weights without image channels have a trained position table.
    """
    patches, dim = state["patch_embed.proj.weight"], len(state["patch_embed.proj.bias"])
    head_dim = len(state["transformer_blocks.0.attn1.norm_q.weight"])
    is_linear = patches.ndim == 2
    tubelet, patch = (
        (config.get("patch_size_t") or 2, config.get("patch_size", 2)) if is_linear else (1, patches.shape[2])
    )
    native, frames = (300, 81) if is_linear else (60, 49)
    rotary = tubelet > 1 or config.get("use_rotary_positional_embeddings", dim > 1920)
    in_channels = patches.shape[1] // (tubelet * patch**2 if is_linear else 1)
    out_channels = len(state["proj_out.bias"]) // (tubelet * patch**2)
    table = state.get("patch_embed.pos_embedding")
    positions = "rope" if rotary else "sincos"
    sizes: dict[str, Any] = {}
    if table is not None and (in_channels > out_channels or config.get("use_learned_positional_embeddings")):
        positions = "rope_and_table"
    elif table is not None:
        text_len, (t, h, w), scale = read_sincos(table)
        positions, sizes = "sincos", {"text_len": text_len, "num_frames": t, "height": patch * h, "width": patch * w}
        sizes["spatial_scale"] = scale
    rotary_grid = config.get("rotary_grid", "stretch") if positions == "rope" else "stretch"
    return {
        "num_heads": dim // head_dim,
        "head_dim": head_dim,
        "depth": num_blocks(state, "transformer_blocks"),
        "in_channels": in_channels,
        "out_channels": out_channels,
        "text_dim": state["patch_embed.text_proj.weight"].shape[1],
        "time_dim": len(state["time_embedding.linear_2.bias"]),
        "patch_size": patch,
        "tubelet_size": tubelet,
        "offset": "ofs_embedding.linear_1.weight" in state,
        "positions": positions,
        "rotary_grid": "crop" if tubelet > 1 else rotary_grid,
        "norm_out_eps": config.get("norm_out_eps", 1e-5),
        "text_len": config.get("max_text_seq_length", 226),
        "num_frames": (config.get("sample_frames", frames) - 1) // 4 + 1,
        "height": config.get("sample_height", native),
        "width": config.get("sample_width", native if is_linear else 90),
        "spatial_scale": config.get("spatial_interpolation_scale", 1.875),
        "causal_chunk": config.get("causal_chunk", 0),
        **sizes,
    }
