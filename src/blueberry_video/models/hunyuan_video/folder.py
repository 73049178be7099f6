"""What HunyuanVideo and HunyuanVideo-1.5 share of reading and writing published weights."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from blueberry_video.models.hunyuan_video.convert import convert_tencent
from blueberry_video.models.hunyuan_video.transformer import DualStreamTransformer
from blueberry_video.weights.diffusers_folder import load_strictly, read_published
from blueberry_video.weights.files import num_blocks

UNTOLD = ("image_condition_type", "rope_theta", "rope_axes_dim")  # settings in diffusers' config that no shape tells


def read(path: str | Path, family: str) -> tuple[dict, dict[str, Tensor]]:
    """See :func:`~blueberry_video.weights.diffusers_folder.read_published`; original files are Tencent's."""
    return read_published(path, family, convert_tencent)


def load_variant(
    model: DualStreamTransformer,
    path: str | Path,
    family: str,
    variant: Callable[[dict[str, Tensor]], str],
    config: dict,
) -> str:
    """Puts published weights into a model, to be trained on.

    Args:
        model: takes them in the precision that it has.
        path: a folder or file.
        family: of the model.
        variant: what a state dict is, in words, by its shapes.
        config: of the model, as diffusers has it: what no shape tells is compared. Another ``image_condition_type`` is
            said, not refused: image-to-video models begin with weights for text alone.

    Returns:
        One sentence on what was loaded.

    Raises:
        FileNotFoundError: if something is missing there.
        ValueError: if they are damaged, of another architecture or of another variant: both are named.
    """
    theirs_config, state = read(path, family)
    theirs, own = variant(state), variant(model.state_dict())
    if theirs != own:
        raise ValueError(
            f"{path} is {theirs}, but the model is {own}: choose the model=text_to_video/… of these weights, or set "
            "model.transformer to their shape."
        )
    told = {key: theirs_config.get(key, value) for key, value in config.items() if key in UNTOLD}
    others = [f"{key}={told[key]} (here {config[key]})" for key in told if told[key] != config[key]]
    if any(key != "image_condition_type" and told[key] != config[key] for key in told):
        raise ValueError(
            f"{path} was trained with {', '.join(others)}, which no weight tells: set model.transformer.rope_theta and "
            "rope_axes to what its config says."
        )
    load_strictly(model, {name: value.to(model.proj_out.weight) for name, value in state.items()}, str(path))
    return f"loaded {theirs} from {path}{f', trained with {others[0]}' if others else ''}"


def settings_of(state: dict[str, Tensor], config: dict) -> dict:
    """Arguments of :class:`~blueberry_video.models.hunyuan_video.transformer.DualStreamTransformer` for a state dict under diffusers' names.

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


def check_square(model: DualStreamTransformer) -> None:
    """Raises a ``ValueError`` for patches that diffusers has no setting for."""
    if model.patch_size[1] != model.patch_size[2]:
        raise ValueError(f"diffusers has no model with patch_size={model.patch_size}: use square patches.")


def config_of(model: DualStreamTransformer, class_name: str) -> dict:
    """The part of diffusers' config that both have."""
    t, h, _ = model.patch_size
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
