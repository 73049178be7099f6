"""Callbacks that every task shares; their arguments are the keys of a config's ``callbacks`` group.

They write under ``trainer.default_root_dir``, which is the run folder. List ``ema`` before what looks at the model at
the end of training (media, probes): callbacks run in their order, and ``ema`` puts the averaged weights into the model
there.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

# Dense 16-bit products, from NVIDIA's data sheets; the first name that is part of the device's counts. Lightning's own
# table has the doubled, sparse rate for the H200, and does not find it by the name that the H200 reports.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


class StepSeed(Callback):
    """Makes the randomness of a training step a pure function of (seed, rank, epoch, batch).

    Masks, dropout and augmentation come out the same however a step was reached: resumed from a checkpoint, or after
    another number of validations, probes and pictures. So no generator's state has to be saved, nor put back at the
    right moment, which Lightning, drawing random numbers of its own between restoring a checkpoint and the first
    batch, does not offer. It holds for what is drawn in ``training_step`` and after it, not for
    ``on_after_batch_transfer``, which runs before any hook of the batch.

    Args:
        seed: the run's seed, 0 or more.

    Raises:
        ValueError: for a negative seed.
    """

    def __init__(self, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"step_seed.seed={seed} is negative: use 0 or more.")
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        position = [self.seed, trainer.global_rank, trainer.current_epoch, batch_idx]
        words = np.random.SeedSequence(position).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(words[1])
        torch.manual_seed(int(words[2]))  # every device's generator


class EMA(WeightAveraging):
    """Keeps an exponential moving average of the weights; validation, pictures, probes and the finished model use it.

    Lightning's ``WeightAveraging`` with the decay warmed up, as short runs need, and with the parameters alone
    averaged: buffers are copied. A checkpoint's ``state_dict`` holds the averaged weights, ``current_model_state`` the
    trained ones.

    Args:
        decay: weight of the old average at each step, below 1.
        warmup: use ``min(decay, (1 + n) / (10 + n))`` at the n-th update, so that the random initialisation is soon
            forgotten.

    Raises:
        ValueError: for a decay outside [0, 1).
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay={decay} is not in [0, 1): 0.999 averages over about the last 1000 steps.")
        super().__init__(use_buffers=False, multi_avg_fn=self._average)
        self.decay = decay
        self.warmup = warmup

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Frozen weights are not averaged: the copy, made before they were loaded, takes them as they are."""
        assert self._average_model is not None
        for averaged, current in zip(self._average_model.module.parameters(), pl_module.parameters()):
            if not current.requires_grad:
                averaged.copy_(current)

    @torch.no_grad()
    def _average(self, averaged: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
        n = int(updates)
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        # the copy has 32 bits also where training has 16: steps of 0.001 would be lost in those
        wide = [value.to(average.dtype) for average, value in zip(averaged, current, strict=True)]
        torch._foreach_lerp_(averaged, wide, 1 - decay)


class Throughput(Callback):
    """Logs ``throughput/clips_per_s``, ``tokens_per_s`` and, on a GPU whose peak is known, ``mfu``, over all devices.

    Time spent on validation does not count; waiting for data and saving checkpoints do. MFU is the share of the
    device's peak arithmetic rate that the forward and backward passes need, counted once in a warm-up step; recomputed
    activations count too.

    Args:
        warmup_steps: batches at the start (and after each resume) that are not counted: compilation, caches,
            allocation.
    """

    def __init__(self, warmup_steps: int = 5) -> None:
        self.warmup_steps = warmup_steps
        self._seen = 0
        self._since: float | None = None
        self._seconds, self._clips, self._tokens = 0.0, 0, 0
        self._counter: FlopCounterMode | None = None
        self._clip_flops = 0.0
        self._peak: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._seen == 1:  # the first batch may still allocate and compile
            self._peak = peak_flops(pl_module.device, str(trainer.precision))
            if self._peak is not None:
                self._counter = FlopCounterMode(display=False)
                self._counter.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        clips = len(batch["video"])
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._clip_flops = self._counter.get_total_flops() / clips
            self._counter = None
        self._seen += 1
        now = time.perf_counter()
        if self._since is not None and self._seen > self.warmup_steps:
            self._seconds += now - self._since
            self._clips += clips
            self._tokens += clips * pl_module.tokens_per_clip(batch)  # type: ignore[operator]
        self._since = now
        if self._seconds and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        clips_per_s = self._clips / self._seconds
        values = {
            "throughput/clips_per_s": clips_per_s * trainer.world_size,
            "throughput/tokens_per_s": self._tokens / self._seconds * trainer.world_size,
        }
        if self._peak and self._clip_flops:
            values["throughput/mfu"] = clips_per_s * self._clip_flops / self._peak
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)
        self._seconds, self._clips, self._tokens = 0.0, 0, 0


def peak_flops(device: torch.device, precision: str) -> float | None:
    """A device's peak rate of dense 16-bit matrix products in FLOP/s; ``None`` where device or precision is another."""
    if device.type != "cuda" or not precision.startswith(("bf16", "16")):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


class Progress(TQDMProgressBar):
    """How far a run is: a bar in a terminal; in a file, a pipe or a cluster's log a line now and then.

    Args:
        refresh_rate: batches between two looks of the bar.
        seconds: between two lines.
    """

    def __init__(self, refresh_rate: int = 10, seconds: float = 10.0) -> None:
        self.lines = not sys.stderr.isatty()
        super().__init__(refresh_rate=0 if self.lines else refresh_rate)
        self.seconds = seconds
        self._told = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *arguments)
        last = trainer.global_step == trainer.max_steps
        if self.lines and trainer.is_global_zero and (last or time.perf_counter() - self._told >= self.seconds):
            self._told = time.perf_counter()
            end = f" of {trainer.max_steps}" if trainer.max_steps > 0 else f", epoch {trainer.current_epoch}"
            shown = ", ".join(f"{name} {value}" for name, value in self.get_metrics(trainer, pl_module).items())
            print(f"step {trainer.global_step}{end}: {shown}", flush=True)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float | dict]:
        wanted = ("train/loss", "val/loss", "throughput/clips_per_s")
        metrics = trainer.callback_metrics
        return {name: f"{metrics[name].item():.4g}" for name in wanted if name in metrics}


class NaNGuard(Callback):
    """Stops the run before a non-finite loss or gradient reaches the weights, and writes ``nan_batch.json``.

    It also logs ``train/grad_norm``, before clipping. Under fp16 the gradients are not checked: there the loss scaler
    skips steps whose gradients overflow, on purpose.

    Args:
        every_n_steps: optimiser steps between two checks; a check waits for the device.

    Raises:
        FloatingPointError: while training, naming the step and the clips of the batch.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        if every_n_steps < 1:
            raise ValueError(f"nan_guard.every_n_steps={every_n_steps} must be 1 or more.")
        self.every_n_steps = every_n_steps
        self._batch: dict[str, Any] = {}
        self._batch_idx = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch, self._batch_idx = batch, batch_idx

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if trainer.global_step % self.every_n_steps == 0 and not torch.isfinite(loss):
            self._stop(trainer, f"the loss is {loss.item()}", [])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if trainer.global_step % self.every_n_steps or str(trainer.precision).startswith("16"):
            return
        gradients = {name: weight.grad for name, weight in pl_module.named_parameters() if weight.grad is not None}
        norm = torch.nn.utils.get_total_norm(list(gradients.values()))
        pl_module.log("train/grad_norm", norm, on_epoch=False, batch_size=1)
        if not torch.isfinite(norm):
            bad = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
            self._stop(trainer, f"the gradient norm is {norm.item()}", bad)

    def _stop(self, trainer: Trainer, what: str, parameters: list[str]) -> None:
        ids = [str(clip) for clip in self._batch.get("id", [])]
        record = {
            "what": what,
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "batch": self._batch_idx,
            "rank": trainer.global_rank,
            "clip_ids": ids,
            "parameters": parameters,
        }
        path = Path(trainer.default_root_dir) / "nan_batch.json"
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        temporary.replace(path)
        clips = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        raise FloatingPointError(
            f"step {trainer.global_step}: {what} on the clips {clips or 'without ids'}; {path} "
            "has all. The weights are those of the step before. Set or lower trainer.gradient_clip_val, lower "
            "optimizer.lr, lengthen the warm-up, use bf16 or 32-bit precision, or look at these clips."
        )


class Media(Callback):
    """Saves what ``task.media`` shows of the first validation batch: ``media/<name>_<step>.gif`` and a sheet, ``.png``;
    where validation has single frames too, also of their first batch: ``<name>_image``.

    Pictures are made in a validation once ``every_n_steps`` steps have passed since the last ones, and when training
    ends. They go to wandb too.

    Args:
        every_n_steps: optimiser steps between two sets of pictures.
        fps: frames a second of the GIFs.
        min_side: a smaller video is enlarged by a whole factor, pixel for pixel, until its shorter side has so many
            pixels.
    """

    def __init__(self, every_n_steps: int = 1000, fps: float = 8.0, min_side: int = 256) -> None:
        if every_n_steps < 1 or fps <= 0 or min_side < 1:
            raise ValueError(
                f"media.every_n_steps={every_n_steps}, media.fps={fps}, media.min_side={min_side}: all must be above 0."
            )
        self.every_n_steps = every_n_steps
        self.fps = fps
        self.min_side = min_side
        self._batches: dict[str, Any] = {}  # by what is added to the name
        self._made_step: int | None = None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx or trainer.sanity_checking or not trainer.is_global_zero or trainer.state.fn != "fit":
            return
        if batch_idx == 0:
            self._batches.clear()
        kind = "_image" if batch["video"].shape[2:3] == (1,) else ""
        if kind in self._batches:
            return
        self._batches[kind] = batch
        made, now = self._made_step, trainer.global_step
        if made is None or made == now or now - made >= self.every_n_steps:  # made now: those of the other kind
            self._make(trainer, pl_module, kind)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for kind in self._batches:
            self._make(trainer, pl_module, kind)
        self._batches.clear()

    @torch.no_grad()
    def _make(self, trainer: Trainer, pl_module: LightningModule, kind: str) -> None:
        self._made_step = trainer.global_step
        was_training = pl_module.training
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)  # the same masks in every picture of a run
            videos = pl_module.eval().media(self._batches[kind])  # type: ignore[operator]
        pl_module.train(was_training)
        folder = Path(trainer.default_root_dir) / "media"
        folder.mkdir(exist_ok=True)
        for name, video in videos.items():
            stem = f"{name.replace('/', '_')}{kind}_{trainer.global_step:08d}"
            frames = enlarge(video.cpu(), self.min_side)
            save_gif(frames, folder / f"{stem}.gif", self.fps)
            contact_sheet(frames).save(folder / f"{stem}.png")
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_video(f"media/{name}{kind}", [str(folder / f"{stem}.gif")])


def enlarge(video: Tensor, min_side: int) -> Tensor:
    """uint8 (T, C, H, W) -> each pixel repeated until the shorter side has at least ``min_side`` pixels.

    Raises:
        ValueError: if ``video`` has another type or shape.
    """
    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[1] not in (1, 3):
        raise ValueError(
            f"task.media gave {video.dtype} {tuple(video.shape)}: give uint8 (T, C, H, W), C = 1 or 3, from 0 to 255."
        )
    factor = -(-min_side // min(video.shape[2:]))
    return video.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)


def save_gif(video: Tensor, path: Path, fps: float) -> None:
    """Writes uint8 (T, C, H, W) as a GIF that loops for ever."""
    first, *rest = _images(video)
    first.save(path, save_all=True, append_images=rest, duration=1000 / fps, loop=0)


def contact_sheet(video: Tensor, max_frames: int = 8, max_width: int = 1600) -> Image.Image:
    """Up to ``max_frames`` frames of uint8 (T, C, H, W), evenly spaced, in rows of about ``max_width`` pixels."""
    count = min(max_frames, len(video))
    frames = _images(video[torch.linspace(0, len(video) - 1, count).round().long()])
    gap, (width, height) = 4, frames[0].size
    rows = -(-count // max(1, min(count, max_width // (width + gap))))
    columns = -(-count // rows)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, frame in enumerate(frames):
        sheet.paste(frame, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def _images(video: Tensor) -> list[Image.Image]:
    return [Image.fromarray(frame.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()) for frame in video]
