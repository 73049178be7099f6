"""What a training will hold on each device, told before anything large is built."""

import os
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from blueberry_video.launch import processes
from blueberry_video.launch.machine import available_memory

GIB = 2**30


def announce(config: DictConfig) -> None:
    """Prints the estimate for a text-to-video model; nothing for others, which are small.

    Raises:
        ValueError: it is more than a device has.
    """
    if processes.shared_folder() or not config.model.get("transformer"):
        return
    parts, shards = estimate(config)
    print(f"memory: {said(parts, shards)}", flush=True)
    if too_much := shortage(config, parts, shards):
        raise ValueError(f"{too_much} Other ways: `model.lora` trains few parameters, and so does a smaller model=….")


def estimate(config: DictConfig) -> tuple[dict[str, int], int]:
    """Bytes by name, see :func:`of_training`, and the number of devices that share them. Nothing is allocated.

    Args:
        config: of a model that can be built on PyTorch's meta device: a text-to-video model.
    """
    import torch
    from hydra.utils import instantiate

    with torch.device("meta"):
        model = instantiate(config.model)
    return of_model(config, model), num_shards(config.trainer)


def of_model(config: DictConfig, model: Any) -> dict[str, int]:
    """As :func:`of_training`, of a model that is there."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return of_training(
        sum(size for size, _ in sizes),
        sum(size for size, trains in sizes if trains),
        str(config.trainer.get("precision", "32-true")),
        config.callbacks.get("ema") is not None,
    )


def of_training(total: int, trained: int, precision: str, ema: bool) -> dict[str, int]:
    """Bytes that training keeps for a model, by name; activations come on top.

    Args:
        total, trained: parameters, and those of them that are trained.
        precision: Lightning's: ``…-true`` keeps weights, gradients and states in that precision, the others in 32 bits.
        ema: whether an average of the weights is kept.
    """
    width = 2 if precision in ("16-true", "bf16-true") else 4
    parts = {"weights": width * total, "gradients": width * trained, "AdamW": 2 * width * trained}
    return {**parts, "average": width * total} if ema else parts


def num_shards(trainer: Mapping[str, Any]) -> int:
    """Into how many parts a trainer's strategy cuts the state: with FSDP as many as there are processes."""
    strategy = trainer.get("strategy") or ""
    name = strategy.get("_target_", "") if isinstance(strategy, Mapping) else strategy
    if "fsdp" not in str(name).lower():
        return 1
    of_machine = processes.count(trainer) * int(trainer.get("num_nodes", 1))
    return max(of_machine, int(os.environ.get("SLURM_NTASKS", "1")))


def said(parts: Mapping[str, int], shards: int) -> str:
    """Such as ``27.1 GiB a device, beside activations and frozen encoders: weights 6.8 GiB + …``."""
    shown = " + ".join(f"{name} {_bytes(size / shards)}" for name, size in parts.items())
    cut = f", in {shards} shards" if shards > 1 else ""
    return f"{_bytes(sum(parts.values()) / shards)} a device{cut}, beside activations and frozen encoders: {shown}"


def shortage(config: DictConfig, parts: Mapping[str, int], shards: int) -> str:
    """One sentence with a remedy where a device has not that much memory, else nothing."""
    import torch

    on_gpu = config.trainer.get("accelerator", "auto") != "cpu" and torch.cuda.is_available()
    there = torch.cuda.mem_get_info()[1] if on_gpu else available_memory()
    needed = sum(parts.values()) / shards
    if there is None or needed < there:
        return ""
    return (
        f"Training needs {_bytes(needed)} a device, and there are {_bytes(there)}: use `trainer=fsdp` on several GPUs, "
        "which share it, or `trainer.precision=bf16-true`, which halves it."
    )


def _bytes(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
