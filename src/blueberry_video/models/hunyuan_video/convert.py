"""Conversion of HunyuanVideo and HunyuanVideo-1.5 weights from Tencent's layout to diffusers', which this package uses.

Besides names, three things differ: query, key and value are one matrix (in 1.5 only in the refiner); the first matrix
of a single-stream block also holds the first MLP matrix; the shift and scale halves of the last modulation are swapped.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blueberry_video.weights.files import num_blocks

# (pattern, replacement), applied to a name in this order.
RENAMES = (
    (r"^(model\.)?diffusion_model\.", ""),
    (r"^img_in\.", "x_embedder."),
    (r"^vector_in\.in_layer\.", "time_text_embed.text_embedder.linear_1."),
    (r"^vector_in\.out_layer\.", "time_text_embed.text_embedder.linear_2."),
    (r"^guidance_in\.", "time_text_embed.guidance_embedder."),
    (r"^txt_in\.input_embedder\.", "context_embedder.proj_in."),
    (r"^txt_in\.t_embedder\.", "context_embedder.time_text_embed.timestep_embedder."),
    (r"^txt_in\.c_embedder\.", "context_embedder.time_text_embed.text_embedder."),
    (r"^txt_in\.individual_token_refiner\.blocks\.", "context_embedder.token_refiner.refiner_blocks."),
    (r"(refiner_blocks\.\d+)\.self_attn_qkv\.", r"\1.attn.qkv."),
    (r"(refiner_blocks\.\d+)\.self_attn_proj\.", r"\1.attn.to_out.0."),
    (r"(refiner_blocks\.\d+)\.mlp\.", r"\1.ff."),
    (r"(refiner_blocks\.\d+)\.adaLN_modulation\.1\.", r"\1.norm_out.linear."),
    (r"^byt5_in\.layernorm\.", "context_embedder_2.norm."),
    (r"^byt5_in\.fc(\d)\.", r"context_embedder_2.linear_\1."),
    (r"^vision_in\.proj\.0\.", "image_embedder.norm_in."),
    (r"^vision_in\.proj\.1\.", "image_embedder.linear_1."),
    (r"^vision_in\.proj\.3\.", "image_embedder.linear_2."),
    (r"^vision_in\.proj\.4\.", "image_embedder.norm_out."),
    (r"^cond_type_embedding\.", "cond_type_embed."),
    (r"^double_blocks\.", "transformer_blocks."),
    (r"^single_blocks\.", "single_transformer_blocks."),
    (r"\.img_mod\.linear\.", ".norm1.linear."),
    (r"\.txt_mod\.linear\.", ".norm1_context.linear."),
    (r"\.img_attn_qkv\.", ".attn.qkv."),
    (r"\.txt_attn_qkv\.", ".attn.added_qkv."),
    (r"\.img_attn_([qkv])\.", r".attn.to_\1."),
    (r"\.txt_attn_([qkv])\.", r".attn.add_\1_proj."),
    (r"\.img_attn_([qk])_norm\.", r".attn.norm_\1."),
    (r"\.txt_attn_([qk])_norm\.", r".attn.norm_added_\1."),
    (r"\.img_attn_proj\.", ".attn.to_out.0."),
    (r"\.txt_attn_proj\.", ".attn.to_add_out."),
    (r"\.img_mlp\.", ".ff."),
    (r"\.txt_mlp\.", ".ff_context."),
    (r"\.([qk])_norm\.", r".attn.norm_\1."),
    (r"\.modulation\.linear\.", ".norm.linear."),
    (r"\.linear2\.", ".proj_out."),
    (r"\.fc1\.", ".net.0.proj."),
    (r"\.fc2\.", ".net.2."),
    (r"\.mlp\.0\.", ".linear_1."),
    (r"\.mlp\.2\.", ".linear_2."),
    (r"^final_layer\.linear\.", "proj_out."),
    (r"^final_layer\.adaLN_modulation\.1\.", "norm_out.linear."),
)
TIMESTEP_RENAMES = {  # is it 1.5 -> timestep embedding
    False: ((r"^time_in\.", "time_text_embed.timestep_embedder."),),
    True: ((r"^time_in\.", "time_embed.timestep_embedder."), (r"^time_r_in\.", "time_embed.timestep_embedder_r.")),
}
SPLITS = {  # fused matrix -> matrices that its rows are split into
    ".attn.qkv.": (".attn.to_q.", ".attn.to_k.", ".attn.to_v."),
    ".attn.added_qkv.": (".attn.add_q_proj.", ".attn.add_k_proj.", ".attn.add_v_proj."),
    ".linear1.": (".attn.to_q.", ".attn.to_k.", ".attn.to_v.", ".proj_mlp."),
}


def convert_tencent(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts a state dict of either version from Tencent's layout to diffusers'.

    Unknown names are kept, so that a strict load reports them.
    """
    is_15 = any(name.endswith("byt5_in.fc1.weight") for name in state)
    renames = (*RENAMES, *TIMESTEP_RENAMES[is_15])
    converted = {}
    for name, value in state.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if name.startswith("norm_out.linear."):
            shift, scale = value.chunk(2)
            value = torch.cat([scale, shift])
        fused = next((key for key in SPLITS if key in name), None)
        if fused is None:
            converted[name] = value
            continue
        dim = len(value) // 3 if fused != ".linear1." else _width(state)
        rows = value.split([dim, dim, dim, *([len(value) - 3 * dim] if fused == ".linear1." else [])])
        for part, matrix in zip(SPLITS[fused], rows, strict=True):
            converted[name.replace(fused, part)] = matrix
    return converted


def _width(state: dict[str, Tensor]) -> int:
    return next(len(value) for name, value in state.items() if name.endswith("img_in.proj.bias"))


ORIGINAL_NAMES = {"rope_dim_list": "rope_axes_dim"}  # of settings that no tensor determines: Tencent's -> diffusers'

# Channels of a head that rotate by time, row and column in published models, by the width of a head. No file in
# Tencent's layout holds them.
PUBLISHED_AXES = {128: (16, 56, 56)}


def check_parts(config: dict[str, Any], state: dict[str, Tensor], source: str | Path) -> None:
    """Checks that weights in Tencent's or diffusers' layout have a token refiner.

    Tencent's code also has ``text_projection="linear"``, an MLP of each text token, which no published model uses.

    Raises:
        ValueError: they have none.
    """
    projection = "linear" if "txt_in.linear_1.weight" in state else config.get("text_projection", "single_refiner")
    if projection != "single_refiner":
        raise ValueError(
            f"{source} has text_projection={projection!r}, without a token refiner: only "
            "text_projection='single_refiner' is supported, which all published models have."
        )


def complete_rotation(arguments: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """Constructor arguments with ``rope_axes``, by default those of the published models, which are then printed.

    Args:
        arguments: constructor arguments, in which ``rope_axes`` is ``None`` where weights and config do not give it.
        source: origin of the weights, for the messages.

    Raises:
        ValueError: no published model has heads of this width.
    """
    if arguments["rope_axes"] is not None:
        return arguments
    head_dim = arguments["head_dim"]
    if head_dim not in PUBLISHED_AXES:
        raise ValueError(
            f"{source} has heads of head_dim={head_dim}, which no published model has, and no config with "
            "rope_axes_dim (diffusers) or rope_dim_list (Tencent), which its tensors do not determine: pass "
            f"rope_axes=…, the three numbers of channels that rotate by time, row and column; their sum is {head_dim}."
        )
    axes, theta = PUBLISHED_AXES[head_dim], arguments["rope_theta"]
    print(f"rope_axes={axes} and rope_theta={theta} are assumed for {source}, as published: no config gives them")
    return {**arguments, "rope_axes": axes}


def settings_of_weights(state: dict[str, Tensor], config: dict) -> dict:
    """Constructor arguments that HunyuanVideo and HunyuanVideo-1.5 share; see
    :meth:`~blueberry_video.models.diffusion_transformer.DiffusionTransformer.settings_of`.

    ``rope_axes`` is ``None`` where ``config`` does not give it, see :func:`complete_rotation`.
    """
    dim, in_channels, *patch_size = state["x_embedder.proj.weight"].shape
    head_dim = len(state["transformer_blocks.0.attn.norm_q.weight"])
    axes = config.get("rope_axes_dim")
    return {
        "in_channels": in_channels,
        "out_channels": len(state["proj_out.bias"]) // (patch_size[0] * patch_size[1] * patch_size[2]),
        "patch_size": tuple(patch_size),
        "num_heads": dim // head_dim,
        "head_dim": head_dim,
        "depth": num_blocks(state, "transformer_blocks"),
        "refiner_depth": num_blocks(state, "context_embedder.token_refiner.refiner_blocks"),
        "mlp_ratio": len(state["transformer_blocks.0.ff.net.0.proj.bias"]) / dim,
        "text_dim": state["context_embedder.proj_in.weight"].shape[1],
        "rope_axes": None if axes is None else tuple(axes),
        "rope_theta": config.get("rope_theta", 256.0),
        "causal_chunk": config.get("causal_chunk", 0),
    }
