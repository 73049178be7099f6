"""Trace of a training step on tensors without data: memory and FLOPs of a model of any size on any machine.

PyTorch's fake tensors have shapes and no memory. The step runs on them as it does in training; a dispatch mode sees
every operation, adds the storages that it allocates and subtracts those that are freed.
"""

import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
STAND_INS = {torch.bool: True, torch.float32: 0.5, torch.float64: 0.5, torch.bfloat16: 0.5, torch.float16: 0.5}
"""Values of elements that Python code reads, as checks of labels do; 1 for integers."""


class Trace(NamedTuple):
    """Cost of a training step on one device.

    Attributes:
        state: bytes of weights, buffers, gradients and optimizer state, by name.
        peak: largest number of allocated bytes, including ``state``.
        flops: floating-point operations of the forward and the backward pass, including recomputed activations.
    """

    state: dict[str, int]
    peak: int
    flops: int

    @property
    def activations(self) -> int:
        """Bytes at the peak in addition to ``state``: activations, batch and temporary tensors."""
        return self.peak - sum(self.state.values())


FLASH, FLASH_BACKWARD = (  # attention of the CPU, with the memory of GPU kernels; without FLOP formulas in PyTorch
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


FLOPS = {FLASH: _attention_flops, FLASH_BACKWARD: _attention_backward_flops}


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of live tensor storages.

    Attributes:
        live: bytes that are allocated now.
        peak: the largest value of ``live``.
        collects: run the garbage collector before the peak rises. Recomputation of activations ends with an exception;
            on fake tensors, its traceback keeps tensors alive that are freed at once in training.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.collects = False
        self._known: dict[int, weakref.ref] = {}

    def add(self, tensor: Tensor) -> None:
        """Counts the storage of a tensor, once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: weakref.ref) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        if self.live > self.peak and self.collects:
            gc.collect()
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return STAND_INS.get(args[0].dtype, 1)
        if func is aten.nonzero.default and isinstance(args[0], FakeTensor):  # all elements, as STAND_INS
            func, args = aten.new_empty.default, (args[0], (args[0].numel(), args[0].dim()))
            kwargs = {"dtype": torch.long}
        if func is aten.bincount.default and isinstance(args[0], FakeTensor):
            length = args[2] if len(args) > 2 else (kwargs or {})["minlength"]
            func, args, kwargs = aten.new_empty.default, (args[0], (length,)), {}
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.add(value)
        return result


def trace(
    module: nn.Module,
    loss: Callable[[Any], Tensor],
    optimizer: Callable[[], torch.optim.Optimizer],
    batch: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
) -> Trace:
    """Traces a training step.

    Args:
        module: module on the meta device, which is replaced by fake tensors in place.
        loss: computes the loss of a batch with ``module``.
        optimizer: builds the optimizer of the parameters of ``module``.
        batch: tensors by name; other values are passed on.
        dtype: type of all floating-point parameters and buffers; None leaves them.
        autocast: type of ``torch.autocast``; None: none.

    Raises:
        ValueError: if a shape depends on the values of a tensor.
    """
    counter = MemoryCounter()
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def replaced(old: Tensor) -> Tensor:
        with fake:
            return torch.empty(old.shape, dtype=dtype if dtype and old.is_floating_point() else old.dtype)

    gc.freeze()  # of the objects that exist already: collections are fast
    # the mode is not active: masks and noise, which depend on no fake tensor, are real, and code may read them
    with counter, FlopCounterMode(display=False, custom_mapping=FLOPS) as flops:
        module._apply(replaced)
        inputs = {
            name: fake.from_tensor(value) if isinstance(value, Tensor) else value for name, value in batch.items()
        }
        for value in inputs.values():
            if isinstance(value, Tensor):
                counter.add(value)
        steps = optimizer()
        for parameter in module.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        steps.step()  # creates the state of the optimizer
        state = _state(module, steps)
        steps.zero_grad()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            try:
                value = loss(inputs)
            except DynamicOutputShapeException as error:
                raise ValueError(
                    f"the step of {type(module).__name__} cannot be traced: the shape of {error.args[0]} depends on "
                    "values of a tensor. `check` runs real steps and prints their memory."
                ) from error
        counter.collects = True
        value.backward()
    gc.unfreeze()
    return Trace(state, counter.peak, flops.get_total_flops())


def _state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    parameters = [*module.parameters()]
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return {
        "weights": _bytes([*parameters, *module.buffers()]),
        "gradients": _bytes([parameter.grad for parameter in parameters if parameter.grad is not None]),
        type(optimizer).__name__: _bytes(moments),
    }


def _bytes(tensors: list[Tensor]) -> int:
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())
