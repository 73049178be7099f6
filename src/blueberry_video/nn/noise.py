"""Gaussian noise that does not depend on the device, nor, with a generator per clip, on the batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

Generator = torch.Generator | Sequence[torch.Generator] | None  # one, one per clip, or torch's global generator


def standard_normal(shape: Sequence[int], generator: Generator, device: torch.device) -> Tensor:
    """Gaussian noise, float32 on ``device``, drawn on that of the generator, so that seeds are portable.

    Args:
        shape: (B, …).
        generator: with one generator per clip, the noise of a clip does not depend on the rest of the batch.
        device: of the result.

    Raises:
        ValueError: if the number of generators is not B.
    """
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} clips: pass one per clip.")
        return torch.cat([standard_normal((1, *shape[1:]), each, device) for each in generator])
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source, dtype=torch.float32).to(device)


def clip_generators(generator: torch.Generator, count: int) -> list[torch.Generator]:
    """Returns ``count`` CPU generators with seeds drawn from ``generator``.

    The seeds of a batch are those of its parts one after the other, so a clip does not depend on the batch size.
    """
    seeds = [torch.randint(2**62, (), generator=generator, device=generator.device).item() for _ in range(count)]
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]
