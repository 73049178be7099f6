"""Frozen submodules that are not part of the parameters of a network."""

from collections.abc import Callable
from typing import Generic, TypeVar, cast

from torch import Tensor, nn

Part = TypeVar("Part", bound=nn.Module)


class Frozen(Generic[Part]):
    """Frozen submodule that is excluded from the parent's parameters, state dict, EMA and sharding.

    The parent moves it to the device. A copy of the parent has its own copy, so that converting one leaves the other
    unchanged.

    Args:
        part: a module, or a function that builds it on first use, so that a config with published weights can be
            inspected, and copied for an EMA, without them.
    """

    def __init__(self, part: Part | Callable[[], Part]):
        self._part = part.requires_grad_(False).eval() if isinstance(part, nn.Module) else part

    @property
    def is_built(self) -> bool:
        return isinstance(self._part, nn.Module)

    def get(self) -> Part:
        """Returns the module, built on first use."""
        if not self.is_built:
            self._part = cast(Callable[[], Part], self._part)().requires_grad_(False).eval()
        return cast(Part, self._part)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies the function of ``nn.Module._apply`` to the tensors of a built part.

        Values are kept, also by ``to_empty``, because the state dict of the parent does not restore them.
        """

        def converted(tensor: Tensor) -> Tensor:
            result = function(tensor)
            if result is not tensor and not (result.is_meta or tensor.is_meta):
                result.copy_(tensor)
            return result

        if self.is_built:
            self.get()._apply(converted)
