"""Reading of weight files and hub repositories. No code in a file is ever executed."""

import argparse
import pickle
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
JEPA_FILE = (
    "as files of V-JEPA do: read it with blueberry_video.models.jepa.model.JEPA.from_published, which takes the name "
    "of the encoder. The state_dict() of that encoder, saved with torch.save, can be given here."
)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a published or own checkpoint file, without its wrapping.

    Args:
        path: a ``.safetensors`` file, or a torch file: bare, or wrapped in ``model`` (VideoMAE), ``module``
            (DeepSpeed) or ``state_dict`` (Lightning).

    Returns:
        Tensors by name; names without the prefixes ``module.``, ``model.`` and ``backbone.``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, holds no state dict, several (V-JEPA), or objects that only running code
            would restore.
    """
    content = read_content(path)
    for wrapping in ("model", "module", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapping), dict):
            content = content[wrapping]
            break
    if isinstance(content, dict) and {"encoder", "predictor"} <= content.keys():
        raise ValueError(f"{path} holds several networks, {JEPA_FILE}")
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(
            f"{path} holds no state dict: expected tensors by name, bare or in 'model', 'module', 'state_dict'."
        )
    return without_prefixes(content)


def without_prefixes(content: dict) -> dict[str, Tensor]:
    """The tensors of a state dict, their names without ``module.``, ``model.`` and ``backbone.`` in front."""
    prefix = re.compile(r"^(module\.|model\.|backbone\.)+")
    return {prefix.sub("", name): value for name, value in content.items() if isinstance(value, Tensor)}


def resolve(source: str | Path) -> Path:
    """Local path of weights, downloaded from the Hugging Face hub where ``source`` is a repository id.

    Args:
        source: a file, a folder, or a hub id such as ``THUDM/CogVideoX-2b``. An existing path is never taken for an id.

    Returns:
        The file or folder.

    Raises:
        FileNotFoundError: there is neither such a path nor such a repository, or the hub cannot be reached.
    """
    path = Path(source)
    if path.exists() or path.suffix in WEIGHT_SUFFIXES or not re.fullmatch(r"[\w-]+/[\w.-]+", str(source)):
        if not path.exists():
            raise FileNotFoundError(f"there are no weights at {source}: give an existing file or folder, or a hub id.")
        return path
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"there are no weights at {source}: it is not an existing path, and the hub did not provide it ({reason}). "
            "Give an existing file or folder, or the id of a repository that you can access."
        ) from error


def read_content(path: str | Path) -> object:
    """All that a checkpoint file holds, its tensors on the CPU.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_weights`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights at {path}: give the path of an existing file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Beside the weights, the original files keep the arguments of their run: an argparse namespace, plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path} cannot be read: it is damaged, or holds objects that would have to run code. Give a whole file, "
            "or save its state dict alone with torch.save, in a session that trusts it."
        ) from error


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """State dict of the model in a Lightning checkpoint of a run, without the prefix ``model.``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or no checkpoint of a run.
    """
    content = read_content(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no checkpoint of a run: it has no state_dict.")
    return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}


def num_blocks(state: dict[str, Tensor], prefix: str) -> int:
    """How many blocks ``<prefix>.<i>.…`` a state dict has."""
    numbers = (int(name[len(prefix) + 1 :].split(".")[0]) for name in state if name.startswith(f"{prefix}."))
    return 1 + max(numbers, default=-1)
