"""Sharded checkpoints: a folder with the parts of every process, written by ``torch.distributed.checkpoint``.

``step_<step>.shards/`` contains

- ``shard-<process>-….safetensors``: parts of sharded tensors, with their position in the whole tensor;
- ``rest.pt``: everything else, written by the first process;
- ``checksums.sha256``: SHA-256 of each file, in the format of ``sha256sum --check``.

The folder is filled under a temporary name, synced to disk and renamed when all processes have written, so that a
folder under its final name is complete. It loads on any number of processes, also in one without a process group. No
file can execute code.
"""

import hashlib
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import empty as empty_dtensor

from blueberry_video.atomic import explained_errors

SUFFIX = ".shards"
REST, CHECKSUMS = "rest.pt", "checksums.sha256"
SHARDED = "__sharded__"  # key of a placeholder in REST: its value is the name of a tensor
FILE_BYTES = 4 << 30  # of all processes together; a file is copied in memory before it is written


def is_sharded(path: str | Path) -> bool:
    """Returns whether a path is the folder of a sharded checkpoint, complete or not."""
    return Path(path).suffix == SUFFIX and Path(path).is_dir()


def has_shards(value: Any) -> bool:
    """Returns whether nested containers have a sharded tensor."""
    if isinstance(value, dict):
        return any(has_shards(item) for item in value.values())
    return isinstance(value, DTensor) or (isinstance(value, list | tuple) and any(has_shards(item) for item in value))


def write_shards(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint with sharded tensors to the folder ``path``, atomically; all processes must call it.

    Raises:
        OSError: in all processes, if one cannot write; names the fix.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shards: dict[str, DTensor] = {}
    rest = _without_shards(checkpoint, "", shards)
    size = sum(tensor.numel() * tensor.element_size() for tensor in shards.values())
    first = dist.get_rank() == 0

    def create() -> None:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
        temporary.mkdir(parents=True)

    def write() -> None:
        writer = dcp.HuggingFaceStorageWriter(str(temporary), _files(shards), save_distributed=True)
        try:
            dcp.save(shards, storage_writer=writer)
        except CheckpointException as error:
            raise next((cause for cause, _ in error.failures.values() if isinstance(cause, OSError)), error) from None

    def hashes() -> dict[str, str]:
        own = sorted(temporary.glob(f"shard-{dist.get_rank() + 1:05d}-*"))
        return {file.name: _sha256(file) for file in own}

    def finish() -> None:
        with (temporary / REST).open("wb") as file:
            torch.save(rest, file)
            file.flush()
            os.fsync(file.fileno())
        found = {name: value for part in gathered for name, value in part.items()} | {REST: _sha256(temporary / REST)}
        with (temporary / CHECKSUMS).open("w") as file:
            file.writelines(f"{value}  {name}\n" for name, value in sorted(found.items()))
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(temporary)
        if path.exists():  # damaged, and its step was trained again
            remove_shards(path)
        temporary.replace(path)
        _sync_folder(path.parent)

    _together(create if first else None, path, size)
    _together(write, path, size)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, _together(hashes, path, size))
    _together(finish if first else None, path, size)


def read_shards(path: Path, mesh: DeviceMesh | None = None, only: str | None = None) -> dict[str, Any]:
    """Reads the folder of a sharded checkpoint.

    Args:
        path: the folder.
        mesh: one dimension, over which tensors are sharded again; all its processes must call. ``None``: whole tensors,
            in one process.
        only: key of the checkpoint, such as ``"state_dict"``, if nothing else is needed.
    """
    rest = torch.load(path / REST, map_location="cpu", weights_only=True)
    if only is not None:
        rest = {only: rest[only]}
    names: list[str] = []
    _with_shards(rest, lambda name: names.append(name))
    known = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {}
    for name in names:
        info: Any = known[name]
        dtype = info.properties.dtype
        if mesh is None:
            tensors[name] = torch.empty(info.size, dtype=dtype)
        else:
            tensors[name] = empty_dtensor(info.size, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
    if tensors:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as intended without a mesh
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=mesh is None)
    return _with_shards(rest, tensors.__getitem__)


def shards_fault(path: Path, part: int = 0, parts: int = 1) -> str | None:
    """Returns a description of what is wrong with a sharded checkpoint, or ``None`` if all files match their checksums.

    Args:
        path: the folder.
        part, parts: check only every ``parts``-th file, from number ``part``.
    """
    if not path.is_dir():
        return "the folder does not exist"
    if not (path / CHECKSUMS).is_file():
        return f"its checksums {CHECKSUMS} are missing"
    lines = [line.split("  ", 1) for line in (path / CHECKSUMS).read_text(errors="replace").splitlines()]
    known, present = {line[-1] for line in lines}, {file.name for file in path.glob("*.safetensors")}
    if not {REST, *present} <= known or any(len(line) != 2 for line in lines):
        return f"its checksums {CHECKSUMS} are damaged"
    for digest, name in lines[part::parts]:
        if not (path / name).is_file():
            return f"its file {name} is missing"
        if _sha256(path / name) != digest:
            return f"its file {name} does not match its checksum: it was truncated or changed"
    return None


def checked_shards(path: Path) -> Path:
    """Returns the folder of a sharded checkpoint after verifying it; every process verifies some of its files.

    Raises:
        ValueError: in all processes, if a file is damaged.
    """
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, shards_fault(path, dist.get_rank(), len(faults)))
    if fault := next(filter(None, faults), None):
        raise ValueError(
            f"checkpoint {path} cannot be loaded: {fault}. Use another one, or resume=last, which resumes the run from "
            "its newest valid checkpoint."
        )
    return path


def remove_shards(path: Path) -> None:
    """Removes the folder of a sharded checkpoint; a kill leaves no incomplete folder under its name."""
    temporary = path.with_name(f".{path.name}.removed.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    path.rename(temporary)
    shutil.rmtree(temporary)


def _together(function: Callable[[], Any] | None, path: Path, size: int) -> Any:
    """Calls a function, if there is one, and returns its value; an ``OSError`` of one process is raised in all."""
    value, error = None, None
    try:
        with explained_errors(path, size):
            value = function() if function is not None else None
    except OSError as raised:
        error = raised
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error and (error.errno, str(error)))
    if error is not None:
        raise error
    if found := next(filter(None, errors), None):
        other = OSError(found[1])
        other.errno = found[0]
        raise other
    return value


def _without_shards(value: Any, path: str, shards: dict[str, DTensor]) -> Any:
    """Replaces the sharded tensors of nested containers by placeholders, and adds them to ``shards``."""
    if isinstance(value, DTensor):
        if tuple(value.placements) != (Shard(0),):
            raise ValueError(f"{path} has placements {value.placements}; only (Shard(dim=0),) can be saved.")
        shards[path] = value
        return {SHARDED: path}
    if isinstance(value, dict):
        replaced = value.copy()  # keeps the class of a state dict
        replaced.update({key: _without_shards(item, f"{path}/{key}", shards) for key, item in value.items()})
        return replaced
    if type(value) in (list, tuple):
        return type(value)(_without_shards(item, f"{path}/{number}", shards) for number, item in enumerate(value))
    return value


def _with_shards(value: Any, tensor: Callable[[str], Any]) -> Any:
    """Replaces the placeholders of nested containers by ``tensor(name)``."""
    if isinstance(value, dict):
        if value.keys() == {SHARDED}:
            return tensor(value[SHARDED])
        replaced = value.copy()
        replaced.update({key: _with_shards(item, tensor) for key, item in value.items()})
        return replaced
    if type(value) in (list, tuple):
        return type(value)(_with_shards(item, tensor) for item in value)
    return value


def _files(shards: dict[str, DTensor]) -> dict[str, int]:
    """Returns the number of the file of each tensor, from 1: tensors in order, up to ``FILE_BYTES`` per number."""
    numbers, filled, number = {}, 0, 1
    for name, tensor in shards.items():
        size = tensor.numel() * tensor.element_size()
        if filled and filled + size > FILE_BYTES:
            filled, number = 0, number + 1
        numbers[name], filled = number, filled + size
    return numbers


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
