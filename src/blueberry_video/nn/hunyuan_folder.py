"""What HunyuanVideo and HunyuanVideo-1.5 share of reading and writing published weights."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from blueberry_video.nn.diffusers_folder import load_strictly, read_published
from blueberry_video.nn.hunyuan import DualStreamTransformer
from blueberry_video.nn.tencent_layout import convert_tencent
from blueberry_video.nn.weight_files import num_blocks


def read(path: str | Path, family: str) -> tuple[dict, dict[str, Tensor]]:
    """See :func:`~blueberry_video.nn.diffusers_folder.read_published`; original files are Tencent's."""
    return read_published(path, family, convert_tencent)


def load_variant(
    model: DualStreamTransformer, path: str | Path, family: str, variant: Callable[[dict[str, Tensor]], str]
) -> str:
    """Puts published weights into a model, to be trained on.

    Args:
        model: takes them in the precision that it has.
        path: a folder or file.
        family: of the model.
        variant: what a state dict is, in words, by its shapes.

    Returns:
        One sentence on what was loaded.

    Raises:
        FileNotFoundError: if something is missing there.
        ValueError: if they are damaged, of another architecture or of another variant: both are named.
    """
    _, state = read(path, family)
    theirs, own = variant(state), variant(model.state_dict())
    if theirs != own:
        raise ValueError(
            f"{path} is {theirs}, but the model is {own}: choose the model=text_to_video/… of these weights, or set "
            "model.transformer to their shape."
        )
    load_strictly(model, {name: value.to(model.proj_out.weight) for name, value in state.items()}, str(path))
    return f"loaded {theirs} from {path}"


def settings_of(state: dict[str, Tensor], config: dict) -> dict:
    """Arguments of :class:`~blueberry_video.nn.hunyuan.DualStreamTransformer` for a state dict under diffusers' names.

    Sizes are those of its shapes; what no shape tells is the config's, or as published.
    """
    dim, in_channels, *patch_size = state["x_embedder.proj.weight"].shape
    head_dim = len(state["transformer_blocks.0.attn.norm_q.weight"])
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
        "rope_axes": tuple(config.get("rope_axes_dim", (head_dim // 8, 7 * head_dim // 16, 7 * head_dim // 16))),
        "rope_theta": config.get("rope_theta", 256.0),
        "causal_chunk": config.get("causal_chunk", 0),
    }


def config_of(model: DualStreamTransformer, class_name: str) -> dict:
    """The part of diffusers' config that both have.

    Raises:
        ValueError: if diffusers has no such model.
    """
    t, h, w = model.patch_size
    if h != w:
        raise ValueError(f"diffusers has no {class_name} with patch_size={model.patch_size}: use square patches.")
    config = {
        "_class_name": class_name,
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
        "num_attention_heads": model.num_heads,
        "attention_head_dim": model.head_dim,
        "num_layers": len(model.transformer_blocks),
        "num_refiner_layers": model.context_embedder.depth,
        "mlp_ratio": model.mlp_ratio,
        "patch_size": h,
        "patch_size_t": t,
        "qk_norm": "rms_norm",
        "text_embed_dim": model.text_dim,
        "rope_theta": model.rope_theta,
        "rope_axes_dim": list(model.rope_axes),
    }
    return config | ({"causal_chunk": model.causal_chunk} if model.causal_chunk else {})
