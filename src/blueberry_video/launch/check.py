"""Dry run: executes every part of a run for a few steps, before the run is started.

The config has been composed and checked before. A part that fails raises its own error; a problem that would occur
later is reported as a finding with its fix.
"""

import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from blueberry_video.launch import memory
from blueberry_video.launch.machine import GIB, available_memory, existing_parent, wandb_key

STEPS = 4
CHEAP_CALLBACKS = ("step_seed", "nan_guard", "throughput")  # the others are built but not run: they are slow


class Findings:
    """Printer of findings, one per line; counts the fatal ones."""

    def __init__(self) -> None:
        self.failed = 0

    def add(self, what: str, text: str, fix: str = "", fatal: bool = True) -> None:
        """Prints a finding; ``fix`` is empty if there is no problem, ``fatal`` if the problem would stop the run."""
        mark = "ok  " if not fix else "FAIL" if fatal else "note"
        print(f"  {mark}  {what:<10} {text}{f'. {fix}' if fix else ''}", flush=True)
        self.failed += bool(fix) and fatal


def dry_run(
    config: DictConfig, create_folder: Callable[[DictConfig, Path], Any], build: Callable[[DictConfig, Any], Any]
) -> None:
    """Builds all parts, runs a few steps and one validation batch, saves, reloads; checks disk, memory and logger.

    Args:
        config: the resolved and checked config.
        create_folder: creates a run folder (a context manager) for a config in a folder, here a temporary one.
        build: builds data, model, task and trainer from a config and its run folder.

    Raises:
        SystemExit: if a finding would stop the run.
    """
    began = time.perf_counter()
    findings = Findings()
    print(f"dry run of {config.name}", flush=True)
    findings.add("config", f"{len(list(_leaves(config)))} values, all keys are valid")
    if not _estimate_memory(config, findings):
        sys.exit(1)
    short = _short_run(config)
    with (
        tempfile.TemporaryDirectory(prefix="blueberry-check-") as temporary,
        create_folder(short, Path(temporary)) as folder,
    ):
        data, model, task, trainer = build(short, folder)
        _describe_model(model, findings)
        _build_callbacks(config, findings)
        seconds = _fit(data, model, task, trainer, findings)
        size = _save_and_reload(trainer, task, build(short, folder)[2], folder.path / "check.ckpt", findings)
    _check_disk(config, size, findings)
    _check_memory(findings)
    _check_logger(config, findings)
    steps = int(config.trainer.get("max_steps", -1))
    if steps > 0:
        findings.add(
            "time", f"about {steps * seconds / 60:.1f} min for {steps} steps at {seconds:.2f} s, without validation"
        )
    print(
        f"{time.perf_counter() - began:.0f} s: "
        + (f"problems to fix: {findings.failed}" if findings.failed else "nothing stops this run")
    )
    if findings.failed:
        sys.exit(1)


def _short_run(config: DictConfig) -> DictConfig:
    """Returns the config limited to a few steps in one process, with logs in the temporary folder only."""
    limits = {
        "max_steps": STEPS,
        "max_epochs": -1,
        "limit_train_batches": STEPS,
        "limit_val_batches": 1,
        "val_check_interval": None,
        "check_val_every_n_epoch": 1,
        "accumulate_grad_batches": 1,
        "log_every_n_steps": 1,
        "devices": 1,
        "strategy": "auto",
        "profiler": None,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    short = config.copy()
    short.trainer = {**short.trainer, **limits}
    short.callbacks = {name: short.callbacks.get(name) for name in CHEAP_CALLBACKS}
    if "mode" in short.logger:
        short.logger.mode = "offline"
    return short


def _describe_model(model: Any, findings: Findings) -> None:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    fix = "" if trained else "All parameters are frozen: set `model.freeze_encoder=false`."
    findings.add("model", f"{type(model).__name__}, {total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained", fix)


def _estimate_memory(config: DictConfig, findings: Findings) -> bool:
    """Adds the memory estimate of a text-to-video model, before it is built; returns False if memory is too small."""
    if not config.model.get("transformer"):
        return True
    parts, shards = memory.estimate(config)
    fix = memory.shortage(config, parts, shards)
    findings.add("state", memory.describe(parts, shards), fix)
    return not fix


def _build_callbacks(config: DictConfig, findings: Findings) -> None:
    built = {name: instantiate(callback) for name, callback in config.callbacks.items() if callback is not None}
    findings.add("callbacks", ", ".join(map(str, built)) or "none")


def _fit(data: Any, model: Any, task: Any, trainer: Any, findings: Findings) -> float:
    """Runs a few steps and a validation batch; returns seconds per step."""
    from lightning.pytorch.callbacks import LambdaCallback, Timer

    timer, idle = Timer(), set[str]()
    trainer.callbacks += [timer, LambdaCallback(on_after_backward=lambda *_: idle.update(_without_gradient(model)))]
    trainer.fit(task, datamodule=data)
    batch = next(iter(data.val_dataloader()))
    video = batch["moments" if "moments" in batch else "video"]
    sizes = f"{len(data.train)} training and {len(data.val)} validation clips"
    findings.add("data", f"{sizes}, video {tuple(video.shape)} {video.dtype}")
    loss = float(trainer.callback_metrics["train/loss"])
    fix = "" if math.isfinite(loss) else "The loss is not finite: lower `optimizer.lr`."
    findings.add("step", f"train/loss {loss:.4g} after {STEPS} steps", fix)
    if idle:
        fix = "The task does not use them, which raises an error with trainer=ddp: freeze or remove them, or use "
        fix += "`trainer=ddp trainer.strategy=ddp_find_unused_parameters_true`."
        findings.add("gradients", f"{len(idle)} parameters without gradient: model.{min(idle)}, …", fix, fatal=False)
    return timer.time_elapsed("train") / STEPS


def _without_gradient(model: Any) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None}


def _save_and_reload(trainer: Any, task: Any, fresh: Any, file: Path, findings: Findings) -> int:
    """Writes a checkpoint and loads it into a newly built task; returns its size in bytes."""
    import torch

    trainer.save_checkpoint(file)
    fresh.load_state_dict(torch.load(file, map_location="cpu", weights_only=False)["state_dict"])
    own = task.state_dict()
    changed = [name for name, value in fresh.state_dict().items() if not torch.equal(value, own[name].cpu())]
    fix = f"{changed[0]} differs after loading: store it in a parameter or a buffer." if changed else ""
    findings.add("checkpoint", f"{file.stat().st_size / 2**20:.1f} MiB, saved and reloaded", fix)
    return file.stat().st_size


def _check_disk(config: DictConfig, size: int, findings: Findings) -> None:
    checkpoints = config.callbacks.get("checkpoints") or {}
    needed = size * (int(checkpoints.get("keep", 2)) + 1) + GIB // 4  # one more while writing; media and logs
    folder = existing_parent(Path(config.output_dir))
    free = shutil.disk_usage(folder).free
    fix = "" if free > needed else "Free some space, or use another disk: `output_dir=…`."
    findings.add("disk", f"{free / GIB:.1f} GiB free in {folder}, a run needs about {needed / GIB:.1f}", fix)


def _check_memory(findings: Findings) -> None:
    import torch

    used, free = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, available_memory()
    fix = "Lower `data.batch_size` or `data.num_workers`." if free is not None and free < GIB // 2 else ""
    findings.add(
        "memory",
        f"{used / GIB:.1f} GiB used" + (f", {free / GIB:.1f} GiB available" if free is not None else ""),
        fix,
        fatal=False,
    )
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        free, total = torch.cuda.mem_get_info()
        used = torch.cuda.max_memory_allocated()
        fix = "Lower `data.batch_size`." if used > 0.9 * total else ""
        findings.add("GPU memory", f"{used / GIB:.1f} of {total / GIB:.1f} GiB used", fix, fatal=False)


def _check_logger(config: DictConfig, findings: Findings) -> None:
    if not config.logger:
        findings.add("logger", "metrics.csv in the run folder")
        return
    name = str(config.logger["_target_"]).rpartition(".")[2]
    mode = os.environ.get("WANDB_MODE", config.logger.get("mode", "auto"))
    if mode == "online" and not wandb_key():
        findings.add(
            "logger",
            f"logger.mode=online for {name}, and there is no key",
            "Run `.venv/bin/wandb login`, or use `logger.mode=offline`.",
        )
        return
    online = mode == "online" or (mode == "auto" and wandb_key())
    where = "online" if online else "offline (online after `.venv/bin/wandb login`)"
    findings.add("logger", f"metrics.csv and {name}, {where}")


def _leaves(node: Any) -> Any:
    for value in node.values() if isinstance(node, Mapping) else node:
        if isinstance(value, Mapping | list) or OmegaConf.is_config(value):
            yield from _leaves(value)
        else:
            yield value
