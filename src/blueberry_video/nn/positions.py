"""Sinusoidal position tables, and modules that hold such tables as buffers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PositionTables(nn.Module, ABC):
    """Base class of modules with position tables as buffers that are not in the state dict.

    The tables are computed again after every conversion of the module, so that a model that is built on the meta device
    and materialized, with ``to_empty`` or ``load_state_dict(assign=True)``, has the right values.
    """

    @abstractmethod
    def tables(self) -> dict[str, Tensor]:
        """Returns the tables by buffer name, float32, computed from the settings of the module."""

    def register_tables(self) -> None:
        """Registers the buffers; called by the constructor once the settings are set."""
        for name, table in self.tables().items():
            self.register_buffer(name, table, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        if any(self._buffers[name] is not buffer for name, buffer in before.items()):
            with torch.no_grad(), torch.device("cpu"):
                for name, table in self.tables().items():
                    if not (buffer := self.get_buffer(name)).is_meta:
                        buffer.copy_(table)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, metadata: Any, *args: Any) -> None:
        """Materializes the tables of this module and of its submodules, in device and dtype of assigned weights."""
        like = next((value for value in state_dict.values() if value.is_floating_point() and not value.is_meta), None)
        if metadata.get("assign_to_params_buffers") and like is not None:
            for module in self.modules():
                if isinstance(module, PositionTables) and any(table.is_meta for table in module.buffers(recurse=False)):
                    with torch.device("cpu"):
                        module._buffers |= {name: table.to(like) for name, table in module.tables().items()}
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)


def sinusoid_table(num_positions: int, dim: int) -> Tensor:
    """Fixed 1-D sinusoid (num_positions, dim), float32: sine on even, cosine on odd channels, interleaved.

    Channel j of position p has the angle p / 10000^(2 floor(j / 2) / dim). For a video, p is the index of the token
    in the flattened (t, h, w) raster: this is the table of VideoMAE, not a 3-D one (Vaswani et al., arXiv
    1706.03762).
    """
    return sinusoid(torch.arange(num_positions), dim).float()


def sinusoid(positions: Tensor, dim: int) -> Tensor:
    """Rows (N, dim) of :func:`sinusoid_table` at arbitrary positions (N,), float64 on their device."""
    channel = torch.arange(dim, dtype=torch.float64, device=positions.device)
    angle = positions.double()[:, None] / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())


def sincos(positions: Tensor, dim: int) -> Tensor:
    """1-D sine-cosine rows (..., dim), float32: the sines of all frequencies, then the cosines.

    Frequency i is 10000^(-2i / dim). The positions of segments of a video in the probes of V-JEPA.
    """
    frequency = 10000 ** (-torch.arange(dim // 2, dtype=torch.float64, device=positions.device) / (dim // 2))
    angles = positions.double()[..., None] * frequency
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def sincos_3d_table(grid: tuple[int, int, int], dim: int) -> Tensor:
    """Fixed 3-D sine-cosine table of V-JEPA (arXiv 2404.08471): (t * h * w, dim), float32, in raster order.

    Time, row and column have 2 * ceil(dim / 6) channels each, in this order: the sines of all frequencies, then the
    cosines. The table is truncated to ``dim`` channels. Frequency i of an axis with d channels is 10000^(-2i / d).
    """
    half = -(-dim // 6)
    frequency = 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
    positions = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    angles = [position.flatten()[:, None] * frequency for position in positions]  # three of (t * h * w, half)
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)[:, :dim].float()


def resize_table(table: Tensor, grid: tuple[int, int, int], new_grid: tuple[int, int, int]) -> Tensor:
    """Resizes a position table (N, D) trilinearly from ``grid`` to ``new_grid`` (t, h, w), as V-JEPA's encoder does."""
    if grid == new_grid:
        return table
    volume = table.T.unflatten(1, grid)[None]  # (1, D, t, h, w)
    return F.interpolate(volume, size=new_grid, mode="trilinear").flatten(2)[0].T
