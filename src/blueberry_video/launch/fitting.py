"""Fit of a traced training step to devices: memory per device, time of a run, and changes that would make it fit."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

from omegaconf import DictConfig, OmegaConf

from blueberry_video.launch.machine import GIB, available_memory, resident_memory
from blueberry_video.launch.trace import Trace

MEMORY = {  # bytes, from NVIDIA's data sheets; the same names as callbacks.PEAK_FLOPS
    "H200": 141e9,
    "H100 PCIe": 80e9,
    "H100 NVL": 94e9,
    "H100": 80e9,
    "A100": 80e9,
    "L40S": 48e9,
    "RTX 4090": 24e9,
}
CONTEXT = 0.8 * GIB  # of CUDA, NCCL and cuBLAS on a device
FRAGMENTS = 0.05  # share of the memory that the caching allocator loses
MALLOC = (
    0.45  # on a CPU, glibc keeps freed blocks: measured, as a share of activations; none with MALLOC_MMAP_THRESHOLD_
)


class Setting(NamedTuple):
    """Devices of a run, and what depends on them.

    Attributes:
        gpus: number of devices.
        device: a key of ``MEMORY``, or ``cpu``.
        batch_size: clips per device and step.
        sharded: model and optimizer state are divided among the devices (FSDP).
        average: number of copies of the weights that averages keep.
        base: bytes of a process without model.
    """

    gpus: int
    device: str
    batch_size: int
    sharded: bool
    average: int
    base: int

    @classmethod
    def of(cls, config: DictConfig, gpus: int, device: str, batch_size: int) -> Self:
        """Returns the setting of a config."""
        strategy = str(config.trainer.get("strategy") or "").lower()
        sharded = "fsdp" in strategy or "modelparallel" in strategy
        average = int(config.callbacks.get("ema") is not None)
        base = resident_memory() if device == "cpu" else int(CONTEXT)
        return cls(gpus, device, batch_size, sharded, average, base)

    @property
    def available(self) -> float:
        """Bytes that a run can use on a device."""
        if self.device == "cpu":
            return float(available_memory() or 0)
        return MEMORY[self.device] * (1 - FRAGMENTS)


def parts(cost: Trace, setting: Setting) -> dict[str, float]:
    """Returns the bytes per device by name."""
    shards = setting.gpus if setting.sharded else 1
    found = {name: size / shards for name, size in cost.state.items()}
    if setting.average:
        found["average"] = cost.state["weights"] / shards
    if setting.gpus > 1 and not setting.sharded:
        found["DDP buckets"] = float(cost.state["gradients"])
    if setting.device == "cpu":
        found["malloc"] = MALLOC * cost.activations
    return {**found, "activations": float(cost.activations), "process": float(setting.base)}


def describe(cost: Trace, setting: Setting) -> str:
    """Formats the memory per device, one part per line."""
    found = parts(cost, setting)
    rows = [f"  {name:<12} {size(value):>10}" for name, value in found.items()]
    total = sum(found.values())
    verdict = "fits" if total <= setting.available else "does not fit"
    shards = f", state in {setting.gpus} shards" if setting.sharded and setting.gpus > 1 else ""
    where = f"{setting.gpus} x {setting.device}, {setting.batch_size} clips each{shards}"
    return "\n".join(
        [
            f"memory per device ({where})",
            *rows,
            f"  {'peak':<12} {size(total):>10} of {size(setting.available)}: {verdict}",
        ]
    )


def describe_time(flops: int, trainer: DictConfig, setting: Setting, peak: float, mfu: float) -> str:
    """Formats FLOPs per step and the time of the run.

    Args:
        flops: of a step on one device.
        trainer: its ``max_steps``, ``accumulate_grad_batches`` and ``precision``.
        setting: the devices.
        peak: dense 16-bit FLOP/s of a device.
        mfu: fraction of it that is reached.
    """
    batches = int(trainer.get("accumulate_grad_batches", 1))
    if str(trainer.get("precision", "32-true")).startswith("32"):
        peak /= 2  # TF32; without it, far less
    seconds = batches * flops / (mfu * peak)
    steps = int(trainer.get("max_steps") or -1)
    clips = setting.batch_size * setting.gpus * batches
    days = f"; {steps} steps: {steps * seconds / 86400:.2g} days" if steps > 0 else ""
    return (
        f"time: {batches * flops / 1e12:.3g} TFLOP per step and device, {seconds:.3g} s at {mfu:.0%} of "
        f"{peak / 1e12:.0f} TFLOP/s ({clips} clips per step, {clips / seconds:.3g} clips/s){days}"
    )


def advise(cost: Trace, setting: Setting, overrides: Sequence[str], again: Callable[[str], Trace]) -> str:
    """Returns changes that make a step fit, most useful first, or the largest batch if it fits.

    Args:
        cost: traced step.
        setting: the devices.
        overrides: ``key=value`` that need less memory, to be tried one by one.
        again: traces the step with an override.
    """
    fixed = sum(parts(cost, setting).values()) - cost.activations
    per_clip = cost.activations / setting.batch_size
    room = int((setting.available - fixed) / per_clip) if per_clip else 0
    if setting.available >= fixed + cost.activations:
        return f"largest data.batch_size that fits: about {room}"
    found = []
    if room >= 1:
        found.append(f"data.batch_size={room}, with trainer.accumulate_grad_batches to keep the global batch")
    for override in overrides:
        total = sum(parts(again(override), setting).values())
        found.append(f"{override}: {size(total)}{'' if total <= setting.available else ', not enough alone'}")
    for gpus in (setting.gpus, 2, 4, 8, 16, 32, 64):
        sharded = setting._replace(sharded=True, gpus=gpus)
        total = sum(parts(cost, sharded).values())
        if gpus >= setting.gpus and gpus > 1 and total <= setting.available:
            found.append(f"trainer=fsdp on {gpus} devices: {size(total)}")
            break
    return "\n".join(
        [
            "to make it fit:",
            *(f"  {each}" for each in found or ["a smaller model, fewer frames or a smaller image_size"]),
        ]
    )


def smaller(config: DictConfig) -> list[str]:
    """Returns overrides that need less memory, of settings that the config has."""
    keys = ("model.transformer.checkpointing", "model.encoder.checkpointing")
    found = [f"{key}=true" for key in keys if OmegaConf.select(config, key) is False]
    precision = str(config.trainer.get("precision"))
    return [*found, *(["trainer.precision=bf16-true"] if precision in ("32-true", "bf16-mixed") else [])]


def changed(config: DictConfig, word: str) -> DictConfig:
    """Returns a config with an override of :func:`smaller`."""
    key, _, value = word.partition("=")
    copy = config.copy()
    OmegaConf.update(copy, key, {"true": True}.get(value, value))
    return copy


def size(count: float) -> str:
    """Formats bytes."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
