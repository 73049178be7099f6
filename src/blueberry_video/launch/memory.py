"""Memory estimate of training per device, without allocating the model."""

import os
import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from blueberry_video.launch import processes
from blueberry_video.launch.machine import GIB, available_memory


def announce(config: DictConfig) -> None:
    """Prints the estimate of a text-to-video model; other models are small and are skipped.

    Raises:
        ValueError: if the estimate exceeds the memory of a device.
    """
    if processes.shared_folder() or not config.model.get("transformer"):
        return
    parts, shards = estimate(config)
    print(f"memory: {describe(parts, shards)}", flush=True)
    if too_much := shortage(config, parts, shards):
        raise ValueError(f"{too_much} Alternatives: `model.lora`, which trains few parameters, or a smaller `model=…`.")


def estimate(config: DictConfig) -> tuple[dict[str, int], int]:
    """Returns bytes by name, see :func:`of_training`, and the number of devices that share them.

    Args:
        config: a config with a text-to-video model, which is built on the meta device.
    """
    import torch
    from hydra.utils import instantiate

    with torch.device("meta"):
        model = instantiate(config.model)
    return of_model(config, model), num_shards(config.trainer)


def of_model(config: DictConfig, model: Any) -> dict[str, int]:
    """Returns :func:`of_training` for a model."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return of_training(
        sum(size for size, _ in sizes),
        sum(size for size, trains in sizes if trains),
        str(config.trainer.get("precision", "32-true")),
        config.callbacks.get("ema") is not None,
    )


def of_training(total: int, trained: int, precision: str, ema: bool) -> dict[str, int]:
    """Returns the bytes of model and optimizer state in training by name, without activations.

    Args:
        total, trained: number of parameters, and of trainable ones.
        precision: Lightning's precision: with ``…-true``, weights, gradients and optimizer states have 16 bits,
            otherwise 32.
        ema: whether there is an exponential moving average of the weights.
    """
    width = 2 if precision in ("16-true", "bf16-true") else 4
    parts = {"weights": width * total, "gradients": width * trained, "AdamW": 2 * width * trained}
    return {**parts, "average": width * total} if ema else parts


def num_shards(trainer: Mapping[str, Any]) -> int:
    """Returns the number of shards of model and optimizer state: the number of processes with FSDP, otherwise 1."""
    strategy = trainer.get("strategy") or ""
    name = strategy.get("_target_", "") if isinstance(strategy, Mapping) else strategy
    if not re.search("fsdp|fullysharded", str(name).lower()):
        return 1
    of_machine = processes.count(trainer) * int(trainer.get("num_nodes", 1))
    return max(of_machine, int(os.environ.get("SLURM_NTASKS", "1")))


def describe(parts: Mapping[str, int], shards: int) -> str:
    """Formats an estimate: ``27.1 GiB per device, plus activations and frozen encoders: weights 6.8 GiB + …``."""
    terms = " + ".join(f"{name} {_bytes(size / shards)}" for name, size in parts.items())
    sharded = f", in {shards} shards" if shards > 1 else ""
    return f"{_bytes(sum(parts.values()) / shards)} per device{sharded}, plus activations and frozen encoders: {terms}"


def shortage(config: DictConfig, parts: Mapping[str, int], shards: int) -> str:
    """Returns an error message with the fix if a device has too little memory, otherwise an empty string."""
    import torch

    on_gpu = config.trainer.get("accelerator", "auto") != "cpu" and torch.cuda.is_available()
    available = torch.cuda.mem_get_info()[1] if on_gpu else available_memory()
    needed = sum(parts.values()) / shards
    if available is None or needed < available:
        return ""
    return (
        f"Training needs {_bytes(needed)} per device, and {_bytes(available)} are available: use `trainer=fsdp` on "
        "several GPUs, which shards the state, or `trainer.precision=bf16-true`, which halves it."
    )


def _bytes(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
