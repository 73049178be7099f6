"""Reading of weight files and hub repositories. No code in a file is ever executed."""

import argparse
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from blueberry_video.weights import hub

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
JEPA_FILE = (
    "as files of V-JEPA do: use blueberry_video.models.jepa.JEPA.from_published, which takes the name of the encoder. "
    "The state_dict() of that encoder, saved with torch.save, is also accepted here."
)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Returns the state dict of a published weight file or of a checkpoint of a run.

    Args:
        path: a ``.safetensors`` file, or a torch file: bare, or wrapped in ``model`` (VideoMAE), ``module``
            (DeepSpeed) or ``state_dict`` (Lightning).

    Returns:
        Tensors by name, without the prefixes ``module.``, ``model.`` and ``backbone.``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds no state dict, several (V-JEPA), or objects that only code can restore.
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
    """Returns the tensors of a state dict, without the prefixes ``module.``, ``model.`` and ``backbone.``, and without
    ``_orig_mod.``, which ``torch.compile`` adds at any depth."""
    prefix = re.compile(r"^(module\.|model\.|backbone\.)+")
    return {
        prefix.sub("", without_compile(name)): value for name, value in content.items() if isinstance(value, Tensor)
    }


def without_compile(name: str) -> str:
    """Returns the name of a tensor without the parts that ``torch.compile`` adds."""
    return re.sub(r"(?<![^.])_orig_mod\.", "", name)


def no_weights(path: Path) -> str:
    """Describes a file that was never a weight file, from its first bytes; empty for any other file."""
    if path.stat().st_size == 0:
        return "it is empty (0 bytes): the download or the copy did not run, or the disk was full. Get the file again"
    with path.open("rb") as file:
        start = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, a text in place of the file: run `git lfs pull` in its repository"
    if re.match(rb"<(!doctype|html|head|\?xml)", start, re.IGNORECASE):
        return "it is an HTML page, not weights, for example of a login. Download the file itself"
    if re.match(rb"[{\[]", start) and path.suffix != ".json":
        return "it is a JSON text, not weights, for example an error message of a server. Download the file itself"
    if not start.strip(b"\0"):
        return "it begins with zeros: it was not written to disk completely. Get the file again"
    return ""


def resolve(weights: str | Path) -> Path:
    """Returns the local path of weights; those on a hub are downloaded to the cache of huggingface_hub first.

    Args:
        weights: a file, a folder, or on a hub ``hf://org/name``, ``hf://org/name@revision``, ``hf://org/name/file`` or
            ``hf://org/name@revision/file``, such as
            ``hf://depth-anything/Video-Depth-Anything-Small/video_depth_anything_vits.pth``. ``hf://`` may be left out
            for a whole repository (``MCG-NJU/videomae-base``), of which safetensors and JSON files are downloaded. An
            existing path takes precedence.

    Raises:
        FileNotFoundError: neither the path nor the repository exists, the hub cannot be reached, or the repository has
            no safetensors file.
    """
    path, text = Path(weights), str(weights)
    if not text.startswith("hf:") and (path.exists() or path.suffix in WEIGHT_SUFFIXES or hub.parse(text) is None):
        if not path.exists():
            raise FileNotFoundError(f"there are no weights at {weights}: give an existing file or folder, or a hub id.")
        return path
    if (source := hub.parse(text)) is None:
        raise FileNotFoundError(
            f"there are no weights at {weights}: give hf://org/name, hf://org/name@revision or hf://org/name/file."
        )
    return hub.fetch(source)


def read_content(path: str | Path) -> object:
    """Returns the whole content of a checkpoint file, with tensors on the CPU.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_weights`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights at {path}: give the path of an existing file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # The original files also hold the arguments of their run, as an argparse namespace: plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError) as error:
        if fault := no_weights(path):
            raise ValueError(f"{path} cannot be read: {fault}.") from error
        raise ValueError(
            f"{path} cannot be read: it is damaged, or holds objects that require running code. Use a complete file, "
            "or save only its state dict with torch.save, in a session that trusts it."
        ) from error


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Returns the state dict of the model in a Lightning checkpoint of a run, without the prefix ``model.``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not a checkpoint of a run.
    """
    content = read_content(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint of a run: it has no state_dict.")
    plain = {without_compile(name): value for name, value in state.items()}
    return {name.removeprefix("model."): value for name, value in plain.items() if name.startswith("model.")}


def num_blocks(state: dict[str, Tensor], prefix: str) -> int:
    """Number of blocks ``<prefix>.<i>.…`` in a state dict."""
    numbers = (int(name[len(prefix) + 1 :].split(".")[0]) for name in state if name.startswith(f"{prefix}."))
    return 1 + max(numbers, default=-1)
