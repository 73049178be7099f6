"""Model folders in the layout of diffusers and transformers: ``config.json`` next to safetensors files.

Reading and writing need neither library, so training and sampling do not import them.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from blueberry_video.atomic import atomic_folder
from blueberry_video.weights.files import no_weights, read_weights, resolve, without_prefixes
from blueberry_video.weights.hub import CONFIG, TORCH_SUFFIXES, no_safetensors

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"  # file names of weights
NAMED_WITH_CONFIG = (DIFFUSERS, TRANSFORMERS, "pytorch_model")  # file names of weights next to their config.json
MAX_SHARD_BYTES = 5_000_000_000

# A tensor name that occurs in one architecture only -> that architecture. The first match counts.
FAMILIES = {
    "patch_embed.text_proj.weight": "CogVideoX",
    "mixins.patch_embed.text_proj.weight": "CogVideoX in SAT's layout",
    "byt5_in.fc1.weight": "HunyuanVideo-1.5 in Tencent's layout",
    "context_embedder_2.linear_1.weight": "HunyuanVideo-1.5",
    "clean_x_embedder.proj.weight": "HunyuanVideo FramePack",
    "double_blocks.0.img_attn_qkv.weight": "HunyuanVideo in Tencent's layout",
    "context_embedder.proj_in.weight": "HunyuanVideo",
    "condition_embedder.time_proj.weight": "Wan",
    "encoder.conv_in.conv.weight": "a video VAE",
    "encoder.conv_in.weight": "an image VAE",
}

UNKNOWN_FAMILY = "an unknown architecture"


def family(state: dict[str, Tensor]) -> str:
    """Architecture of a state dict, recognized by its tensor names."""
    bare = {re.sub(r"^(model\.)?(diffusion_model\.)?", "", name) for name in state}
    for name, architecture in FAMILIES.items():
        if name in bare:
            return architecture
    return f"{UNKNOWN_FAMILY} ({', '.join(sorted(state)[:3])}, …)"


def read_source(weights: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Config and state dict of published weights, under the names of the files.

    Args:
        weights: a folder (see :func:`read_folder`), a weight file (see
            :func:`~blueberry_video.weights.files.read_weights`), or weights on a hub, see
            :func:`~blueberry_video.weights.files.resolve`.

    Returns:
        The config and the state dict. The config of a file is the ``config.json`` next to it for the names that
        transformers and diffusers give, such as ``pytorch_model.bin``; for a checkpoint in a run folder, it has the
        numbers of attention heads in the config of the run; otherwise it is empty.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """
    path = resolve(weights)
    return read_folder(path) if path.is_dir() else (config_of_file(path), read_weights(path))


def config_of_file(file: Path) -> dict[str, Any]:
    """Settings that accompany a weight file, see :func:`read_source`.

    Raises:
        ValueError: the ``config.json`` is damaged.
    """
    config = file.with_name(CONFIG)
    if file.stem not in NAMED_WITH_CONFIG or not config.is_file():
        return heads_of_run(file)
    return read_config(config.parent)


def read_config(folder: Path) -> dict[str, Any]:
    """Content of the ``config.json`` of a folder.

    Raises:
        ValueError: it is damaged.
    """
    try:
        content = json.loads((folder / CONFIG).read_text())
        if not isinstance(content, dict):
            raise TypeError("it is not a mapping")
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{folder}: its {CONFIG} is damaged ({error}): download the folder again.") from error
    return content


def model_of_run(file: Path) -> dict[str, Any]:
    """Section ``model`` of the ``config.yaml`` of the run that wrote a checkpoint; empty for any other file."""
    folder = file.absolute().parent
    config = folder.parent / "config.yaml"
    if folder.name != "checkpoints" or not config.is_file():
        return {}
    try:
        model = yaml.safe_load(config.read_text())["model"]
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        return {}
    return model if isinstance(model, dict) else {}


def heads_of_run(file: Path) -> dict[str, int]:
    """Numbers of attention heads in the ``config.yaml`` of the run that wrote a checkpoint, under the names of
    transformers; empty for any other file."""
    model = model_of_run(file)
    encoder = model.get("encoder")
    if not isinstance(encoder, dict) or "num_heads" not in encoder:
        return {}
    found = {"num_attention_heads": encoder["num_heads"]}
    prefixes = {"decoder": "decoder", "predictor": "pred"}  # here -> in transformers
    keys = {f"{ours}_num_heads": f"{theirs}_num_attention_heads" for ours, theirs in prefixes.items()}
    return found | {theirs: model[ours] for ours, theirs in keys.items() if isinstance(model.get(ours), int)}


def read_published(
    weights: str | Path,
    expected: str,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    original_config: Mapping[str, Any] | None = None,
) -> tuple[dict, dict[str, Tensor]]:
    """Config and state dict of a source (see :func:`read_source`), under the names of diffusers.

    Args:
        weights: a folder, a weight file, or a hub id.
        expected: the required architecture, see :func:`family`.
        convert: converts a state dict in the original layout to that of diffusers.
        original_config: settings of the original code, which complete the config of weights in its layout.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or of a different architecture; the message names it.
    """
    config, state = read_source(weights)
    found = family(state)
    if found != expected and not found.startswith(f"{expected} in "):
        raise ValueError(f"{weights} holds {found}, not {expected}: choose the model for these weights.")
    return (config, state) if found == expected else ({**(original_config or {}), **config}, convert(state))


def read_folder(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Config and state dict of a model folder, or of its subfolder ``transformer``.

    Raises:
        FileNotFoundError: the folder, its config or a shard named in the index is missing.
        ValueError: a file is damaged.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() and (folder / "transformer" / CONFIG).is_file():
        folder = folder / "transformer"
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}: give a model folder of diffusers or transformers.")
    names = (DIFFUSERS, TRANSFORMERS)
    stem = next((name for name in names if list(folder.glob(f"{name}*.safetensors*"))), DIFFUSERS)
    index, config = folder / f"{stem}.safetensors.index.json", read_config(folder)
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{folder}: its index is damaged ({error}): download the folder again.") from error
    files = sorted(shards) or [f"{stem}.safetensors"]
    if not list(folder.glob("*.safetensors")):
        named = sorted(path.name for path in folder.iterdir() if path.suffix in TORCH_SUFFIXES)
        raise FileNotFoundError(no_safetensors(str(folder), named))
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: download the missing files.")
    state: dict[str, Tensor] = {}
    for name in files:
        try:
            state |= load_file(folder / name)
        except SafetensorError as error:
            fault = no_weights(folder / name) or "it is damaged. Download it again"
            raise ValueError(f"{folder / name} cannot be read: {fault}.") from error
    return config, without_prefixes(state)


def write_folder(
    folder: str | Path,
    config: dict,
    state: dict[str, Tensor],
    max_shard_size: int = MAX_SHARD_BYTES,
    *,
    stem: str = DIFFUSERS,
) -> None:
    """Writes a model folder that :func:`read_folder` and ``from_pretrained`` of diffusers or transformers load.

    The folder appears under its name once it is complete.

    Args:
        folder: must not exist, or be empty.
        config: settings of the model, with its class as ``_class_name`` (diffusers) or ``architectures``
            (transformers).
        state: tensors by name.
        max_shard_size: largest size of a safetensors file in bytes.
        stem: name of the weight files, :data:`DIFFUSERS` or :data:`TRANSFORMERS`.

    Raises:
        FileExistsError: the folder is a file, or not empty.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: choose a different folder.")
    # a part of a fused matrix of a converted file is a view of it, which safetensors refuses
    state = {name: x.clone() if x.nbytes < x.untyped_storage().nbytes() else x for name, x in state.items()}
    with atomic_folder(folder) as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        pattern = f"{stem}{{suffix}}.safetensors"
        save_torch_state_dict(state, partial, filename_pattern=pattern, max_shard_size=max_shard_size)
