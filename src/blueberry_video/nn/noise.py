"""Gaussian noise that does not depend on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def standard_normal(shape: Sequence[int], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Gaussian noise, float32 on ``device``, drawn on that of the generator, so that seeds are portable."""
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source, dtype=torch.float32).to(device)
