"""Dry run: executes every part of a run for a few steps, before the run is started.

It trains, validates, samples, evaluates as at the end of a run, saves and reloads; a run of several processes is also
tried with two. The config has been composed and checked before. A part that fails raises its own error; a problem that
would occur later is reported as a finding with its fix.
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

from blueberry_video.launch import memory, processes
from blueberry_video.launch.machine import GIB, WANDB_MODES, available_memory, existing_parent, wandb_key, wandb_mode

STEPS = 4
SAMPLER_STEPS = 2
SKIPPED_CALLBACKS = ("progress", "checkpoints")  # checkpoints: the dry run saves one itself
LARGEST = {  # sizes of the evaluations in the dry run, by argument
    "train_clips": 8,
    "val_clips": 8,
    "num_labelled": 8,
    "steps": 2,
    "lrs": 1,
    "clips": 36,  # of generated shapes: one per caption
    "episodes": 1,
    "max_steps": 2,
    "iterations": 1,
    "samples": 16,
    "elites": 4,
    "random_tries": 1,
    "every_n_steps": STEPS,
}


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
    config: DictConfig,
    create_folder: Callable[[DictConfig, Path], Any],
    build: Callable[[DictConfig, Any], Any],
    resumed: Any = None,
) -> None:
    """Runs every part of a run for a few steps, see the module; checks disk, memory and logger.

    For a run that is resumed, the steps start from the weights and the optimizer state of its checkpoint.

    Args:
        config: the resolved and checked config.
        create_folder: creates a run folder (a context manager) for a config in a folder, here a temporary one.
        build: builds data, model, task and trainer from a config and its run folder.
        resumed: the run that is resumed, with the attributes ``run``, ``changes`` and ``complete``, already checked
            with the overrides; no file of it is changed.

    Raises:
        SystemExit: if a finding would stop the run.
    """
    began = time.perf_counter()
    findings = Findings()
    print(f"dry run of {config.name}", flush=True)
    findings.add("config", f"{len(list(_leaves(config)))} values, all keys are valid")
    checkpoint = resumed.run.checkpoint() if resumed else None
    if resumed:
        _describe_resumed(resumed, checkpoint, findings)
        if resumed.complete:
            return
    if not _estimate_memory(config, findings):
        sys.exit(1)
    short = _short_run(config)
    if checkpoint is not None:
        short.init_from = None  # the weights are those of the checkpoint
    with (
        tempfile.TemporaryDirectory(prefix="blueberry-check-") as temporary,
        create_folder(short, Path(temporary)) as folder,
    ):
        data, model, task, trainer = build(short, folder)
        step = 0
        if checkpoint is not None:
            single = processes.count(config.trainer) == 1
            step = _load(checkpoint, task, trainer, build(short, folder)[0] if single else None, findings)
        _describe_model(model, findings)
        _describe_classes(data, findings)
        _build_callbacks(config, findings)
        if not _check_clip_counts(config, data, findings):
            sys.exit(1)
        seconds = _fit(data, model, task, trainer, findings)
        size = _save_and_reload(trainer, task, build(short, folder)[2], folder.path / "check.ckpt", findings)
        _evaluate(config, data, task, trainer, findings)
    if (number := processes.count(config.trainer)) > 1:
        _try_two_processes(config, number, create_folder, findings)
    _check_disk(config, size, findings)
    _check_memory(findings)
    _check_logger(config, findings)
    steps = int(config.trainer.get("max_steps", -1)) - step
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
    """Returns the config limited to a few steps and small evaluations, in one process, with logs in the temporary
    folder only."""
    limits = {
        "max_steps": STEPS,
        "max_epochs": -1,
        "limit_train_batches": STEPS,
        "limit_val_batches": 1,
        "limit_test_batches": 1,
        "val_check_interval": None,
        "check_val_every_n_epoch": 1,
        "accumulate_grad_batches": 1,
        "log_every_n_steps": 1,
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "profiler": None,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    short = config.copy()
    short.trainer = {**short.trainer, **limits}
    for name in SKIPPED_CALLBACKS:
        short.callbacks[name] = None
    _limit(short.callbacks, LARGEST)
    if wandb_mode(short.logger.get("mode", "auto"), bool(wandb_key())) == "online":
        short.logger.mode = "offline"
    return short


def _limit(node: DictConfig, largest: Mapping[str, int]) -> None:
    """Lowers the numbers, and shortens the lists, of the keys in ``largest``, in place."""
    for key, value in node.items():
        if isinstance(value, DictConfig):
            _limit(value, largest)
        elif key in largest and OmegaConf.is_list(value):
            node[key] = value[: largest[str(key)]]
        elif key in largest and isinstance(value, int | float):
            node[key] = min(value, largest[str(key)])


def _try_two_processes(
    config: DictConfig, number: int, create_folder: Callable[[DictConfig, Path], Any], findings: Findings
) -> None:
    """Runs the short run in two processes, as the run is started.

    Raises:
        RuntimeError: if one of them fails.
    """
    short = _short_run(config)
    devices = config.trainer.devices
    short.trainer.devices = list(devices)[:2] if OmegaConf.is_list(devices) else 2
    short.trainer.strategy = config.trainer.get("strategy", "auto")
    if OmegaConf.is_dict(short.trainer.strategy) and "sequence_parallel" in short.trainer.strategy:
        short.trainer.strategy.sequence_parallel = min(2, short.trainer.strategy.sequence_parallel)
    short.check = False
    if "sampler" in short.task:
        _limit(short.task.sampler, {"steps": SAMPLER_STEPS})
    with (
        tempfile.TemporaryDirectory(prefix="blueberry-check-") as temporary,
        create_folder(short, Path(temporary)) as folder,
    ):
        processes.start(short, folder.path, 2)
    findings.add("processes", f"2 of {number} processes: trained, validated and evaluated")


def _describe_resumed(resumed: Any, checkpoint: Path | None, findings: Findings) -> None:
    start = f"from {checkpoint.name}" if checkpoint else "from step 0, because it has no checkpoint"
    if resumed.complete:
        start = "complete: nothing is left to train"
    count = len(resumed.changes)
    findings.add("resume", f"{resumed.run.path}, {start}, {count} overrides that change it")
    if not os.access(resumed.run.path, os.W_OK):
        findings.add("resume", f"{resumed.run.path} is not writable", "Make it writable to continue the run in it.")


def _load(checkpoint: Path, task: Any, trainer: Any, data: Any, findings: Findings) -> int:
    """Loads a checkpoint as a resumed run does: the weights, the optimizer state when training starts, and, in one
    process, the position in the clips; returns its step."""
    import torch
    from lightning.pytorch.callbacks import Callback

    from blueberry_video.parallel.sharded_checkpoint import is_sharded, read_shards

    content = read_shards(checkpoint) if is_sharded(checkpoint) else torch.load(checkpoint, "cpu", weights_only=True)

    class LoadOptimizers(Callback):
        def on_train_start(self, *_: Any) -> None:
            for optimizer, state in zip(trainer.optimizers, content["optimizer_states"], strict=True):
                optimizer.load_state_dict(state)

    fix = ""
    try:
        task.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        fix = f"They do not fit the model of this version ({reason}): check out the commit in its run.json."
    findings.add("weights", f"step {content['global_step']}, {checkpoint}", fix)
    if fix:
        sys.exit(1)
    if data is not None and (position := content.get(type(data).__qualname__)):
        data.load_state_dict(position)
    trainer.callbacks.append(LoadOptimizers())
    return int(content["global_step"])


def _describe_model(model: Any, findings: Findings) -> None:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    fix = "" if trained else "All parameters are frozen: set `model.freeze_encoder=false`."
    findings.add("model", f"{type(model).__name__}, {total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained", fix)


def _describe_classes(data: Any, findings: Findings) -> None:
    """Adds the classes of each label of the training set."""
    for label, names in getattr(data, "classes", {}).items():
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        findings.add("classes", f"{label}: {len(names)} ({shown})")


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


def _check_clip_counts(config: DictConfig, data: Any, findings: Findings) -> bool:
    """Adds a finding for each evaluation at the end of the run that needs more clips than there are."""
    before = findings.failed
    for name, callback in config.callbacks.items():
        for split, key in (("train", "train_clips"), ("train", "num_labelled"), ("val", "val_clips")):
            dataset = getattr(data, split)
            dataset = getattr(dataset, "parts", {}).get((callback or {}).get("part"), dataset)
            wanted = (callback or {}).get(key) or 0
            if wanted > len(dataset):
                text = f"callbacks.{name}.{key}={wanted} exceeds the {len(dataset)} clips of data.{split}"
                findings.add("evaluation", text, f"Use `callbacks.{name}.{key}={len(dataset)}` or less.")
    return findings.failed == before


def _fit(data: Any, model: Any, task: Any, trainer: Any, findings: Findings) -> float:
    """Runs a few steps, a validation batch and the callbacks of a run; returns seconds per step."""
    idle, seconds = set[str](), list[float]()
    trainer.callbacks.insert(0, _watch(task, model, idle, seconds))  # first: times exclude the others
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
    return sum(seconds) / STEPS


def _watch(task: Any, model: Any, idle: set[str], seconds: list[float]) -> Any:
    """Returns a callback that shortens sampling, and collects parameters without gradient and seconds of steps."""
    from lightning.pytorch.callbacks import Callback

    class Watch(Callback):
        since = 0.0

        def on_fit_start(self, *_: Any) -> None:  # after setup, which checks the steps of the run
            if (sampler := getattr(task, "sampler", None)) is not None:
                sampler.steps = min(sampler.steps, SAMPLER_STEPS)

        def on_after_backward(self, *_: Any) -> None:
            idle.update(_without_gradient(model))

        def on_train_batch_end(self, *_: Any) -> None:
            seconds.append(time.perf_counter() - self.since)
            self.since = time.perf_counter()

        def on_train_start(self, *_: Any) -> None:
            self.since = time.perf_counter()

        def on_validation_end(self, *_: Any) -> None:
            self.since = time.perf_counter()

    return Watch()


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


def _evaluate(config: DictConfig, data: Any, task: Any, trainer: Any, findings: Findings) -> None:
    """Evaluates a batch of the validation and the test set, as at the end of a run, and checks the names of metrics."""
    metrics = set(trainer.callback_metrics)
    for evaluate in (trainer.validate, trainer.test) if data.test is not None else (trainer.validate,):
        evaluate(task, datamodule=data, verbose=False)
        metrics |= set(trainer.callback_metrics)
    findings.add("evaluation", f"{len(metrics)} metrics: {', '.join(sorted(metrics))}")
    prefixes = {name.partition("/")[0] for name in metrics}
    for name in config.expected:
        if name not in metrics:
            prefix = str(name).partition("/")[0]
            # parts of a mixture, and evaluations, may log a metric that the few batches of a dry run do not have
            rare = hasattr(data.val, "parts") if prefix in ("train", "val", "test") else prefix in prefixes
            fix = f"Correct the name, or remove it: a gate on it {'may fail' if rare else 'fails'}."
            findings.add("expected", f"expected.{name} is no metric of the dry run", fix, fatal=not rare)


def _check_disk(config: DictConfig, size: int, findings: Findings) -> None:
    checkpoints = config.callbacks.get("checkpoints") or {}
    needed = size * (int(checkpoints.get("keep", 2)) + 1) + GIB // 4  # one more while writing; media and logs
    folder = existing_parent(Path(config.output_dir))
    if not folder.is_dir():
        findings.add("outputs", f"output_dir={config.output_dir}: {folder} is a file", "Use a folder: `output_dir=…`.")
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        fix = f"Make it writable (`chmod u+rwX '{folder}'`), or use a different folder: `output_dir=…`."
        findings.add("outputs", f"output_dir={config.output_dir}: {folder} is not writable", fix)
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
    value = os.environ.get("WANDB_MODE", "")
    mode = wandb_mode(config.logger.get("mode", "auto"), bool(wandb_key()))
    if mode is None:
        fix = f"Use one of {', '.join(WANDB_MODES)}, or `unset WANDB_MODE`."
        findings.add("logger", f"WANDB_MODE={value!r} is no mode of wandb", fix)
    elif mode == "online" and not wandb_key():
        fix = "Run `.venv/bin/wandb login`, or use `logger.mode=offline`."
        findings.add("logger", f"{name} is to be online, and there is no key", fix)
    else:
        where = {"offline": "offline (online after `.venv/bin/wandb login`)", "disabled": "disabled by the environment"}
        findings.add("logger", f"metrics.csv and {name}, {where.get(mode, mode)}")


def _leaves(node: Any) -> Any:
    for value in node.values() if isinstance(node, Mapping) else node:
        if isinstance(value, Mapping | list) or OmegaConf.is_config(value):
            yield from _leaves(value)
        else:
            yield value
