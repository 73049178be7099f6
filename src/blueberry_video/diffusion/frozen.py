"""Frozen submodules that are not part of the parameters of a network."""

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, cast

from torch import nn

Part = TypeVar("Part", bound=nn.Module)


class Frozen(Generic[Part]):
    """Frozen submodule that is excluded from the parent's parameters, state dict, EMA and sharding.

    Copies share it, because a text encoder may have 10 GB. The parent moves it to the device.

    Args:
        part: a module, or a function that builds it on first use, so that a config with published weights can be
            inspected without them.
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self
