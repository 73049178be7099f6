"""Running averages in at least 32 bits: of weights, of statistics of latents, and of codebooks.

With a momentum of 0.999, an update changes an average by a thousandth of a difference, which 16 bits mostly round away.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def update_averages(averages: Sequence[Tensor], values: Sequence[Tensor], weight: float) -> None:
    """Updates running averages in-place: average += weight * (value - average), in the dtype of the average.

    Args:
        averages: tensors of at least 32 bits, see :meth:`RunningAverages.wide_averages`.
        values: one tensor per average, of the same shape and any floating dtype.
        weight: 1 - momentum, in [0, 1].

    Raises:
        ValueError: for an average of less than 32 bits.
    """
    if narrow := [average.dtype for average in averages if _is_narrow(average)]:
        raise ValueError(f"a running average of dtype={narrow[0]} loses its updates: use float32 or float64.")
    wide = [value.detach().to(average.dtype) for average, value in zip(averages, values, strict=True)]
    if averages:
        torch._foreach_lerp_(list(averages), wide, weight)


class RunningAverages(nn.Module, ABC):
    """Base class of modules with running averages among their parameters or buffers.

    An average that was cast to 16 bits has a float32 copy, which is updated and rounded into the tensor.
    ``state_dict()`` contains the float32 copies under the names of the tensors, and ``load_state_dict`` restores them.
    Elements of a tensor that were changed in a different way replace those of its copy. FSDP2 shards copies like their
    tensors. Averages of 32 and 64 bits have no copy.
    """

    @abstractmethod
    def averages(self) -> dict[str, Tensor]:
        """Returns the running averages among the parameters and buffers of the module and its submodules, by name."""

    @contextmanager
    def wide_averages(self) -> Iterator[dict[str, Tensor]]:
        """Yields the averages in at least 32 bits, by name, to be updated in-place; then rounds them into the tensors.

        Gradients are disabled inside.
        """
        with torch.no_grad():
            wide, narrow = self._wide_values(), self._narrow()
            yield wide
            for name, tensor in narrow.items():
                tensor.copy_(wide[name])
            self.__dict__["_float32"] = {name: wide[name] for name in narrow}

    def state_dict(self, *arguments: Any, prefix: str = "", **options: Any) -> Any:
        state = super().state_dict(*arguments, prefix=prefix, **options)
        copies = self._copies()
        for name, value in (self._wide_values() if copies else {}).items():
            if name in copies and prefix + name in state:
                state[prefix + name] = value
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *arguments: Any
    ) -> None:
        self.__dict__["_loaded"] = True
        averages = {prefix + name for name in self.averages()}
        dtypes = {value.dtype for name, value in state_dict.items() if name not in averages}
        for name, tensor in self._narrow().items():
            value = state_dict.get(prefix + name)
            if value is None or _is_narrow(value) or value.is_meta:
                self._copies().pop(name, None)
                continue
            self._copies()[name] = value.detach().float().clone()
            if local_metadata.get("assign_to_params_buffers") and tensor.dtype in dtypes:  # of a 16-bit checkpoint
                state_dict[prefix + name] = value.to(tensor.dtype)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: tensor.detach() for name, tensor in self.averages().items()}
        super()._apply(fn, recurse)
        for name in self._narrow() if self.__dict__.get("_loaded") else ():  # values of a checkpoint survive a cast
            if not _is_narrow(before[name]) and not before[name].is_meta:
                self._copies()[name] = before[name].float()
        return self

    def _copies(self) -> dict[str, Tensor]:
        """Float32 copies by name; not buffers, which would be cast with the module."""
        return self.__dict__.setdefault("_float32", {})

    def _narrow(self) -> Mapping[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.averages().items() if _is_narrow(tensor)}

    @torch.no_grad()
    def _wide_values(self) -> dict[str, Tensor]:
        """Returns every average in at least 32 bits: the tensor itself, or its float32 copy."""
        values = {name: tensor.detach() for name, tensor in self.averages().items()}
        for name, tensor in self._narrow().items():
            copy, values[name] = self._copies().get(name), tensor.float()
            if copy is not None:
                if isinstance(tensor, DTensor) and not isinstance(copy, DTensor):
                    copy = distribute_tensor(copy.to(tensor.device), tensor.device_mesh, tensor.placements)
                copy = copy.to(tensor.device)
                values[name] = torch.where(copy.to(tensor.dtype) == tensor, copy, values[name])
        return values


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4
