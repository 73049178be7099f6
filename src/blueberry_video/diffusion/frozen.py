"""A frozen part of a network that is no part of its parameters."""

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, cast

from torch import nn

Part = TypeVar("Part", bound=nn.Module)


class Frozen(Generic[Part]):
    """Holds a module beside another: it is not trained, averaged, cut into shards or saved with it.

    Copies share it: of a text encoder of 10 GB there is one. It may be built later, so that a config that names
    published weights can be looked at without them. Whoever holds it moves it to its device.

    Args:
        part: a module, or what builds one.
    """

    def __init__(self, part: Part | Callable[[], Part]):
        self._part = part
        if self.is_built:
            self._freeze()

    @property
    def is_built(self) -> bool:
        return isinstance(self._part, nn.Module)

    def get(self) -> Part:
        """The module, built if it has not been."""
        if not self.is_built:
            self._part = cast(Callable[[], Part], self._part)()
            self._freeze()
        return cast(Part, self._part)

    def _freeze(self) -> None:
        cast(nn.Module, self._part).requires_grad_(False).eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self
