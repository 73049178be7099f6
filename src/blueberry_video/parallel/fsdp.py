"""Fully sharded parameters (FSDP2): every process holds a part of each parameter, its gradient and optimizer state.

:func:`parallelize` shards a model block by block: the parameters of a block are gathered while it runs. A family names
its lists of blocks in ``block_lists``. Sharded parameters are DTensors, which keep their names, shapes and order.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

NARROW = (torch.bfloat16, torch.float16)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a model that are sharded separately, in the order of their names; none contains another.

    These are the members of the lists that a class names in ``block_lists``, such as ``block_lists = ("blocks",)``. A
    class without it is sharded by a rule: blocks are the members of every ``nn.ModuleList`` of two or more modules of
    one class that have submodules. A block must be called, not only its parts: its parameters are gathered by hooks of
    ``block(…)``.
    """
    found: list[nn.Module] = []

    def search(module: nn.Module) -> None:
        names = getattr(type(module), "block_lists", None)
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and (_are_blocks(child) if names is None else name in names):
                found.extend(block for block in child if any(True for _ in block.parameters()))
            else:
                search(child)

    search(model)
    return list(dict.fromkeys(found))


def _are_blocks(children: nn.ModuleList) -> bool:
    kinds = {type(child) for child in children}
    return len(children) > 1 and len(kinds) == 1 and all(any(True for _ in child.children()) for child in children)


def parallelize(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None = None) -> nn.Module:
    """Shards a model in place over a mesh: its blocks, and then all other parameters together.

    Parameters and buffers get the values of the first process. The gradient of a parameter is the mean over the
    processes, as in DDP.

    Args:
        model: frozen and trainable parameters, on the CPU or the device of the mesh.
        mesh: one dimension; of the type of the device.
        dtype: dtype in which the parameters of blocks are gathered, such as bfloat16 for ``bf16-mixed``; ``None`` for
            that of the parameters. Classes with ``gathered_in_float32``, and parameters outside blocks, keep their
            dtype. Gradients of 16 bits are averaged in 32.

    Returns:
        The model, whose class is now also an ``FSDPModule``.

    Raises:
        ValueError: for a parameter without dimensions, which cannot be sharded.
    """
    if scalar := next((name for name, parameter in model.named_parameters() if parameter.ndim == 0), None):
        raise ValueError(
            f"{scalar} has shape () and cannot be sharded by trainer=fsdp: give it the shape (1,), or use trainer=ddp."
        )
    for block in blocks_of(model):
        keeps = any(getattr(part, "gathered_in_float32", False) for part in block.modules())
        _shard(block, mesh, None if keeps else dtype)
    _shard(model, mesh, None)
    model.__dict__["gathered_dtype"] = dtype
    return model


def _shard(module: nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None) -> None:
    """Shards the parameters of a module that are not sharded yet."""
    on_gpu = mesh.device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device(mesh.device_type)
    own = [tensor for tensor in module.parameters() if not isinstance(tensor, DTensor)]
    for tensor in (*own, *module.buffers()):
        tensor.data = tensor.data.to(device)
        if mesh.size() > 1:
            dist.broadcast(tensor.data, int(mesh.mesh.flatten()[0]), group=mesh.get_group())
    narrow = dtype is not None or any(parameter.dtype in NARROW for parameter in own)
    policy = MixedPrecisionPolicy(dtype, torch.float32 if narrow else None, cast_forward_inputs=False)
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Context manager in which every process has all parameters of a sharded model, for evaluation without gradients.

    One process may then run the model alone, and call any of its methods. The parameters of blocks have the dtype in
    which they are gathered; operations run under autocast to it. All processes must enter. Does nothing for a model
    that is not sharded.
    """
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    if not parts:
        yield
        return
    if isinstance(model, FSDPModule):
        model._get_fsdp_state()._lazy_init()  # otherwise by the first step
    dtype, device = model.__dict__.get("gathered_dtype"), next(model.parameters()).device.type
    with torch.no_grad():
        for part in parts:
            part.unshard()
    try:
        with _without_hooks(parts), torch.autocast(device, dtype) if dtype is not None else nullcontext():
            yield
    finally:
        for part in parts:
            part.reshard()


@contextmanager
def _without_hooks(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Removes the hooks of FSDP, which count the calls of a block: the number must be equal on all processes."""
    tables = [table for part in parts for table in (part._forward_pre_hooks, part._forward_hooks)]
    before: list[dict[int, Any]] = [dict(table) for table in tables]
    for table in tables:
        for key in [key for key, hook in table.items() if hook.__module__.startswith("torch.distributed.fsdp")]:
            del table[key]
    try:
        yield
    finally:
        for table, hooks in zip(tables, before):
            table.clear()
            table.update(hooks)


def full(tensor: Tensor) -> Tensor:
    """Returns a sharded tensor as a whole, on every process; other tensors unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shards a whole tensor, equal on every process, as ``like``; returned unchanged if ``like`` is not sharded.

    The dtype stays that of ``tensor``. No data is exchanged.
    """
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    mesh, placements = like.device_mesh, like.placements
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    part = tensor.detach()[tuple(slice(start, start + size) for start, size in zip(offset, shape))]
    local = part.to(like.to_local().device, copy=True).contiguous()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=tensor.shape, stride=_strides(tensor))


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return torch.empty(tensor.shape, device="meta").stride()


def shard_copy(copied: nn.Module, model: nn.Module) -> None:
    """Shards the parameters of a copy of a model, made before the model was sharded, as those of the model.

    The copy holds values, such as averages of the weights; it cannot be called.
    """
    current = dict(model.named_parameters())
    for name, parameter in list(copied.named_parameters()):
        if isinstance(current[name], DTensor) and not isinstance(parameter, DTensor):
            parent, _, leaf = name.rpartition(".")
            sharded = nn.Parameter(shard_like(parameter, current[name]), parameter.requires_grad)
            copied.get_submodule(parent)._parameters[leaf] = sharded


def map_tensors(value: Any, function: Any) -> Any:
    """Returns nested containers with ``function`` applied to every tensor, in their order; values are not copied."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        mapped = value.copy()  # keeps the class and the metadata of a state dict
        mapped.update({key: map_tensors(item, function) for key, item in value.items()})
        if hasattr(value, "_metadata"):
            mapped._metadata = value._metadata  # type: ignore[attr-defined]
        return mapped
    if type(value) in (list, tuple):
        return type(value)(map_tensors(item, function) for item in value)
    return value
