"""The weights of CogVideoX as its authors store them (SAT, the SwissArmyTransformer; github.com/THUDM/CogVideo)."""

import re

import torch
from torch import Tensor

SAT = (  # the beginnings of names in the original files, and what they become; blocks and norms of heads apart
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
# Computed tables, and embeddings of SAT's language models that CogVideoX never uses.
SAT_UNUSED = re.compile(r"mixins\.pos_embed\.freqs_|transformer\.(word|position)_embeddings\.|.*embed_tokens")


def convert_sat(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an original file, ``mp_rank_00_model_states.pt``, under the names of
    :class:`~blueberry_video.models.cogvideox.CogVideoX`.

    The modulation of a block, twelve parts, is that of attention and MLP of the video, then of the text; query, key and
    value are one matrix. Unknown names stay, for a strict load to report.

    Args:
        state: tensors by name, with or without ``model.diffusion_model.`` in front.
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
