"""Callbacks for all tasks; their arguments are the keys of the ``callbacks`` group of a config.

They write to ``trainer.default_root_dir``, the run folder. List ``ema`` before callbacks that use the model at the end
of training (media, probes): callbacks run in order, and ``ema`` then copies the averaged weights into the model.
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

from blueberry_video.atomic import write_text
from blueberry_video.nn.running_average import RunningAverages, update_averages
from blueberry_video.parallel.fsdp import full, gathered, shard_copy
from blueberry_video.parallel.ranks import data_rank, data_world_size

# Dense 16-bit FLOP/s from NVIDIA's data sheets; the first key contained in the device name applies. Lightning's table
# has the doubled, sparse rate for the H200, and does not match the name that the H200 reports.
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
    """Seeds every training step with a pure function of (seed, rank, epoch, batch).

    Processes that share a clip, under sequence parallelism, have one rank here.

    Masks, dropout and augmentation are the same however a step is reached: resumed from a checkpoint, or after a
    different number of validations, probes and media. So the state of the generators need not be saved and restored,
    which is not exact from a callback: Lightning draws random numbers between restoring a checkpoint and the first
    batch. The seed covers ``training_step`` and later hooks, not ``on_after_batch_transfer``, which runs before any
    hook of the batch.

    Args:
        seed: the seed of the run, at least 0.

    Raises:
        ValueError: if the seed is negative.
    """

    def __init__(self, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"step_seed.seed={seed} must be at least 0.")
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        position = [self.seed, data_rank(trainer), trainer.current_epoch, batch_idx]
        words = np.random.SeedSequence(position).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(words[1])
        torch.manual_seed(int(words[2]))  # every device's generator


class EMA(WeightAveraging):
    """Exponential moving average of the weights, used by validation, media, probes and the final model.

    Lightning's ``WeightAveraging`` with a warmup of the decay, for short runs, and at least 32 bits in every precision.
    Only parameters are averaged; buffers are copied. In a checkpoint, ``state_dict`` contains the averaged weights and
    ``current_model_state`` the trained ones.

    Args:
        decay: weight of the previous average at each step, below 1.
        warmup: use ``min(decay, (1 + n) / (10 + n))`` at the n-th update, so that the weight of the random
            initialization decays fast.

    Raises:
        ValueError: if the decay is outside [0, 1).
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay={decay} must be in [0, 1): 0.999 averages over about the last 1000 steps.")
        super().__init__(use_buffers=False, multi_avg_fn=self._average)
        self.decay = decay
        self.warmup = warmup
        self._kept: dict[int, Tensor] = {}  # in validation: trained weights of a different dtype than their average

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Creates the averages, with at least 32 bits."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        assert self._average_model is not None
        if trainer.precision == "64-true":  # before a checkpoint is loaded
            self._average_model.double()
        averaged = self._average_model.module
        trained = [weight for weight in averaged.parameters() if weight.requires_grad]
        for weight in (*trained, *_running_averages(averaged)):
            weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shards the averages as the weights, if these are sharded."""
        assert self._average_model is not None
        shard_copy(self._average_model.module, pl_module)

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copies frozen weights to the average, which is created before they are loaded.

        A resumed run has averages of a target encoder, which is frozen, but changes.
        """
        assert self._average_model is not None
        averages = {id(value) for value in _running_averages(pl_module)} if self._average_model.n_averaged else set()
        for averaged, current in zip(self._average_model.module.parameters(), pl_module.parameters()):
            if not current.requires_grad and id(current) not in averages:
                averaged.copy_(current)

    @torch.no_grad()
    def _average(self, averaged: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
        n = int(updates)
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        update_averages(averaged, current, 1 - decay)

    def _swap_models(self, pl_module: LightningModule) -> None:
        """Swaps the weights; an average of more bits than the weights is not overwritten by its rounded value."""
        assert self._average_model is not None
        kept, self._kept = self._kept, {}
        pairs = zip(_tensors(self._average_model.module), _tensors(pl_module), strict=True)
        for position, (average, current) in enumerate(pairs):
            if position in kept:
                current.copy_(kept[position])
                continue
            trained = current.clone()
            current.copy_(average)
            if average.dtype == current.dtype:
                average.copy_(trained)
            else:
                self._kept[position] = trained


def _running_averages(module: torch.nn.Module) -> list[Tensor]:
    """Parameters and buffers that are running averages, such as the weights of a target encoder."""
    parts = [part.averages() for part in module.modules() if isinstance(part, RunningAverages)]
    return [value for part in parts for value in part.values()]


def _tensors(module: torch.nn.Module) -> list[Tensor]:
    """Parameters and buffers, without gradients."""
    return [tensor.data for tensor in (*module.parameters(), *module.buffers())]


class Throughput(Callback):
    """Logs ``throughput/clips_per_s``, ``tokens_per_s`` and, on a GPU with known peak, ``mfu``, over all devices.

    The time of validation is excluded; waiting for data and saving checkpoints are included. MFU is the fraction of the
    device's peak FLOP/s used by the forward and backward passes. Their FLOPs, including recomputed activations, are
    counted once in a warmup step.

    Args:
        warmup_steps: batches to skip at the start and after each resume (compilation, caches, allocation).
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
            "throughput/clips_per_s": clips_per_s * data_world_size(trainer),
            "throughput/tokens_per_s": self._tokens / self._seconds * data_world_size(trainer),
        }
        if self._peak and self._clip_flops:
            values["throughput/mfu"] = clips_per_s * self._clip_flops / self._peak
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)
        self._seconds, self._clips, self._tokens = 0.0, 0, 0


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Returns the peak FLOP/s of dense 16-bit matrix products; ``None`` for other devices or precisions."""
    if device.type != "cuda" or not precision.startswith(("bf16", "16")):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


class Progress(TQDMProgressBar):
    """Progress bar in a terminal; lines of text if stderr is a file, a pipe or the log of a cluster job.

    Args:
        refresh_rate: batches between two updates of the bar.
        seconds: seconds between two lines.
    """

    def __init__(self, refresh_rate: int = 10, seconds: float = 10.0) -> None:
        self.lines = not sys.stderr.isatty()
        super().__init__(refresh_rate=0 if self.lines else refresh_rate)
        self.seconds = seconds
        self._printed = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *arguments)
        last = trainer.global_step == trainer.max_steps
        if self.lines and trainer.is_global_zero and (last or time.perf_counter() - self._printed >= self.seconds):
            self._printed = time.perf_counter()
            end = f" of {trainer.max_steps}" if trainer.max_steps > 0 else f", epoch {trainer.current_epoch}"
            shown = ", ".join(f"{name} {value}" for name, value in self.get_metrics(trainer, pl_module).items())
            print(f"step {trainer.global_step}{end}: {shown}", flush=True)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float | dict]:
        wanted = ("train/loss", "val/loss", "throughput/clips_per_s")
        metrics = trainer.callback_metrics
        return {name: f"{metrics[name].item():.4g}" for name in wanted if name in metrics}


class NaNGuard(Callback):
    """Stops the run before a non-finite loss or gradient reaches the weights, and writes ``nan_batch.json``.

    Also logs ``train/grad_norm``, before clipping. With fp16, gradients are not checked: the loss scaler skips steps
    with overflowing gradients.

    Args:
        every_n_steps: optimizer steps between two checks; a check synchronizes with the device.

    Raises:
        FloatingPointError: in training; names the step and the clips of the batch.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        if every_n_steps < 1:
            raise ValueError(f"nan_guard.every_n_steps={every_n_steps} must be at least 1.")
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
        norm = full(torch.nn.utils.get_total_norm(list(gradients.values())))
        if self.every_n_steps == 1:
            pl_module.log("train/grad_norm", norm, on_epoch=False, batch_size=1)
        else:  # Lightning would repeat the value in the rows of later steps
            trainer.callback_metrics["train/grad_norm"] = norm
            for logger in trainer.loggers:
                logger.log_metrics({"train/grad_norm": norm.item()}, step=trainer.global_step)
        if not torch.isfinite(norm):
            bad = [name for name, gradient in gradients.items() if not torch.isfinite(full(gradient)).all()]
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
        write_text(path, json.dumps(record, indent=2) + "\n")
        clips = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        raise FloatingPointError(
            f"step {trainer.global_step}: {what} for the clips {clips or 'without ids'}; all are listed in {path}. The "
            "weights are those of the previous step. Set or lower trainer.gradient_clip_val, lower optimizer.lr, "
            "lengthen the warmup, use bf16 or 32-bit precision, or check these clips."
        )


class Media(Callback):
    """Saves the videos of ``task.media`` for the first validation batch, as GIF and PNG contact sheet.

    Writes ``media/<name>_<step>.gif`` and ``.png``, and logs the GIF to wandb. If validation also has batches of single
    frames, the first of them is saved as ``<name>_image``. Media are saved in the first validation that is at least
    ``every_n_steps`` steps after the previous media, and at the end of training. A run that is resumed at its end, or
    after its last validation, reads the batch again and saves the media that are missing.

    Args:
        every_n_steps: optimizer steps between two sets of media.
        fps: frames per second of the GIFs.
        min_side: smaller videos are enlarged by an integer factor, by repeating pixels, until the shorter side has at
            least this number of pixels.
    """

    def __init__(self, every_n_steps: int = 1000, fps: float = 8.0, min_side: int = 256) -> None:
        if every_n_steps < 1 or fps <= 0 or min_side < 1:
            raise ValueError(
                f"media.every_n_steps={every_n_steps}, media.fps={fps}, media.min_side={min_side} must be positive."
            )
        self.every_n_steps = every_n_steps
        self.fps = fps
        self.min_side = min_side
        self._batches: dict[str, Any] = {}  # by suffix of the name
        self._made_step: int | None = None
        self._kinds: list[str] = []  # suffixes of the validation before the checkpoint from which the run resumes
        self._trained = False

    def state_dict(self) -> dict[str, Any]:
        return {"made_step": self._made_step, "kinds": list(self._batches) or self._kinds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._made_step = state_dict["made_step"]
        self._kinds = state_dict.get("kinds", [])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._trained and trainer.is_global_zero:  # the media at the end are of other weights
            _complete_media(trainer).unlink(missing_ok=True)
        self._trained = True

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if batch_idx == 0:
            self._batches.clear()
        kind = _kind(batch)
        if kind in self._batches:
            return
        self._batches[kind] = batch
        made, now = self._made_step, trainer.global_step
        if made is None or made == now or now - made >= self.every_n_steps:  # equal: the other kind, same step
            self._make(trainer, pl_module, kind)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        marker, step = _complete_media(trainer), str(trainer.global_step)
        if self._made_step != trainer.global_step and not (marker.is_file() and marker.read_text() == step):
            if not self._batches and self._kinds:
                self._read_batches(trainer)
            for kind in self._batches:
                self._make(trainer, pl_module, kind)
            if self._batches and trainer.is_global_zero:
                marker.parent.mkdir(exist_ok=True)
                write_text(marker, step)
        self._batches.clear()

    def _read_batches(self, trainer: Trainer) -> None:
        """Reads the first validation batch of each kind, as validation does."""
        for batch in trainer.fit_loop.epoch_loop.val_loop._data_source.dataloader():
            batch = trainer.precision_plugin.convert_input(batch)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            if _kind(batch) in self._kinds:
                self._batches.setdefault(_kind(batch), batch)
            if len(self._batches) == len(self._kinds):
                return

    def _make(self, trainer: Trainer, pl_module: LightningModule, kind: str) -> None:
        """Makes the media of a batch on the first process; all processes must call it."""
        self._made_step = trainer.global_step
        with gathered(pl_module):
            if trainer.is_global_zero:
                self._save(trainer, pl_module, kind)

    @torch.no_grad()
    def _save(self, trainer: Trainer, pl_module: LightningModule, kind: str) -> None:
        was_training = pl_module.training
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)  # the same masks in all media of a run
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


def _kind(batch: Any) -> str:
    """Returns the suffix of the names of a batch's media."""
    return "_image" if batch["video"].shape[2:3] == (1,) else ""


def _complete_media(trainer: Trainer) -> Path:
    """Returns the file with the last step of the training; written when its media are complete."""
    return Path(trainer.default_root_dir) / "media" / ".complete"


def enlarge(video: Tensor, min_side: int) -> Tensor:
    """Enlarges uint8 (T, C, H, W) by repeating pixels until the shorter side has at least ``min_side`` pixels.

    Raises:
        ValueError: if ``video`` has a different dtype or shape.
    """
    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[1] not in (1, 3):
        raise ValueError(
            f"task.media returned {video.dtype} {tuple(video.shape)}: return uint8 (T, C, H, W) with C = 1 or 3."
        )
    factor = -(-min_side // min(video.shape[2:]))
    return video.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)


def save_gif(video: Tensor, path: Path, fps: float) -> None:
    """Writes uint8 (T, C, H, W) as a looping GIF."""
    first, *rest = _images(video)
    first.save(path, save_all=True, append_images=rest, duration=1000 / fps, loop=0)


def contact_sheet(video: Tensor, max_frames: int = 8, max_width: int = 1600) -> Image.Image:
    """Returns up to ``max_frames`` evenly spaced frames of uint8 (T, C, H, W), in rows of about ``max_width`` px."""
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
