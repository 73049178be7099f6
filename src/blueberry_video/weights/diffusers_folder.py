"""Folders of a model as diffusers saves them: ``config.json`` beside safetensors files, one or several with an index.

Read and written here without diffusers, so that no import of it is needed to train or to sample.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from blueberry_video.weights.files import read_weights

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model"
MAX_SHARD_BYTES = 5_000_000_000

# A name that only this architecture has in its state dict -> what it is. The first that fits counts.
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


def family(state: dict[str, Tensor]) -> str:
    """Which architecture a state dict is of, by the names in it."""
    bare = {re.sub(r"^(model\.)?(diffusion_model\.)?", "", name) for name in state}
    for name, what in FAMILIES.items():
        if name in bare:
            return what
    return f"an unknown architecture ({', '.join(sorted(state)[:3])}, …)"


def read_published(
    path: str | Path, expected: str, convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> tuple[dict, dict[str, Tensor]]:
    """The config (empty for a file) and the state dict, under diffusers' names, at ``path``.

    Args:
        path: a folder, see :func:`read_folder`, or a file, see :func:`~blueberry_video.weights.files.read_weights`.
        expected: the family wanted, see :func:`family`.
        convert: what turns its original layout into diffusers'.

    Raises:
        FileNotFoundError: if something is missing there.
        ValueError: if it is damaged, or of another family, which is named.
    """
    config, state = read_folder(path) if Path(path).is_dir() else ({}, read_weights(path))
    found = family(state)
    if found != expected and not found.startswith(f"{expected} in "):
        raise ValueError(f"{path} holds {found}, not {expected}: choose the model that these weights are of.")
    return config, state if found == expected else convert(state)


def read_folder(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """The config and the state dict in a folder of diffusers, or in its ``transformer`` folder.

    Raises:
        FileNotFoundError: if there is no such folder, no config, or a shard that the index names is missing.
        ValueError: if a file is damaged.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() and (folder / "transformer" / CONFIG).is_file():
        folder = folder / "transformer"
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}: give the folder of a model that diffusers saved.")
    index, single = folder / f"{WEIGHTS}.safetensors.index.json", folder / f"{WEIGHTS}.safetensors"
    try:
        config = json.loads((folder / CONFIG).read_text())
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [single.name]
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{folder}: its {CONFIG} or index is damaged ({error}): fetch the folder again.") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: fetch the rest of the folder.")
    state: dict[str, Tensor] = {}
    for name in names:
        try:
            state |= load_file(folder / name)
        except SafetensorError as error:
            raise ValueError(f"{folder / name} cannot be read: it is damaged. Fetch it again.") from error
    return config, state


def write_folder(
    folder: str | Path, config: dict, state: dict[str, Tensor], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes what :func:`read_folder`, and diffusers' ``from_pretrained``, read.

    Args:
        folder: made if it is not there; must hold no other model.
        config: with the model's class as ``_class_name``.
        state: tensors by name.
        max_shard_bytes: tensors are put into as few files of at most this size as their order allows.

    Raises:
        FileExistsError: if there are weights in the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    present = sorted(folder.glob(f"{WEIGHTS}*"))
    if present:
        raise FileExistsError(f"{folder} holds weights already ({present[0].name}): choose another folder.")
    shards: list[dict[str, Tensor]] = [{}]
    for name, value in state.items():
        value = value.detach().cpu().contiguous()
        filled = sum(other.nbytes for other in shards[-1].values())
        if shards[-1] and filled + value.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = value
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if len(shards) == 1:
        save_file(shards[0], folder / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{WEIGHTS}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    total = sum(value.nbytes for value in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def load_strictly(model: torch.nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Puts tensors into a model as they are, in their precision.

    Raises:
        ValueError: if some are missing, left over, or of other shapes; the message names some of each.
    """
    own = model.state_dict()
    faults = (
        ("missing", own.keys() - state.keys()),
        ("left over", state.keys() - own.keys()),
        ("of another shape", {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape}),
    )
    found = "; ".join(f"{len(names)} {what}, such as {min(names)}" for what, names in faults if names)
    if found:
        raise ValueError(f"the weights in {source} do not fit {type(model).__name__}: {found}.")
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.load_state_dict(state, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
