"""Files of weights, and what can be told of a state dict by its names. Nothing in a file is ever run."""

import argparse
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

JEPA_FILE = (
    "as files of V-JEPA do: read it with blueberry_video.models.jepa.from_published, which asks for the encoder to "
    "take. The state_dict() of that encoder, saved with torch.save, can be given here."
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


def num_blocks(state: dict[str, Tensor], prefix: str) -> int:
    """How many blocks ``<prefix>.<i>.…`` a state dict has."""
    numbers = (int(name[len(prefix) + 1 :].split(".")[0]) for name in state if name.startswith(f"{prefix}."))
    return 1 + max(numbers, default=-1)
