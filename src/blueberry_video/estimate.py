"""Estimate entry point: memory per device, FLOPs and days of an experiment, before it is started.

    python -m blueberry_video.estimate --config-dir experiments/<name> [--gpus 8] [--device H100] [key=value …]

A training step is traced on tensors without data, so no GPU is needed and the model may be larger than this machine.
"""

import argparse
import sys
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from blueberry_video.augmentation import repeat_clips
from blueberry_video.callbacks import PEAK_FLOPS
from blueberry_video.config import with_classes
from blueberry_video.data.batches import collate
from blueberry_video.launch import command_line, fitting
from blueberry_video.launch.errors import OneParagraphErrors
from blueberry_video.launch.trace import Trace, trace

DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}
ONE_PROCESS = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
TEXT_TOKENS = 226  # of CogVideoX


def main() -> None:
    parser = argparse.ArgumentParser(prog="blueberry estimate", allow_abbrev=False)
    parser.add_argument("--gpus", type=int, default=1, help="number of devices")
    parser.add_argument("--device", choices=[*fitting.MEMORY, "cpu"], default="H100", help="type of the devices")
    parser.add_argument("--mfu", type=float, default=0.4, help="fraction of the peak FLOP/s that is reached")
    parser.add_argument("--latents", default="13x60x90", help="latent frames x height x width of text-to-video models")
    known, rest = parser.parse_known_args(sys.argv[1:])
    if known.gpus < 1 or not 0 < known.mfu <= 1:
        raise ValueError(f"--gpus {known.gpus} must be at least 1, and --mfu {known.mfu} above 0 and at most 1.")
    config = command_line.parse(rest).config()
    command_line.quiet_libraries()
    latents = tuple(map(int, known.latents.split("x")))
    cost, batch_size, note = estimate(config, latents, on_gpu=known.device != "cpu")
    setting = fitting.Setting.of(config, known.gpus, known.device, batch_size)
    print("\n".join(filter(None, (f"estimate of {config.name}", note, fitting.describe(cost, setting)))))
    if known.device != "cpu":
        print(fitting.describe_time(cost.flops, config.trainer, setting, PEAK_FLOPS[known.device], known.mfu))
    print(
        fitting.advise(
            cost, setting, fitting.smaller(config), lambda word: estimate(fitting.changed(config, word), latents)[0]
        )
    )


def estimate(config: DictConfig, latents: tuple[int, ...] = (), on_gpu: bool = True) -> tuple[Trace, int, str]:
    """Traces a training step of an experiment.

    Args:
        config: the resolved and checked config.
        latents: size (t, h, w) of the latents of a text-to-video model, of which only the transformer is traced.
        on_gpu: use the optimizer's implementation for GPUs, which needs more memory for temporary tensors.

    Returns:
        Cost of a step on one device, clips per step, and a note on the clips.

    Raises:
        ValueError: if the step cannot be traced.
    """
    config = with_classes(config)
    with torch.device("meta"):
        model = instantiate(config.model)
    optimization = instantiate(config.task.optimization)(
        optimizer=instantiate(config.optimizer), schedule=instantiate(config.schedule), init_from=None
    )
    task = instantiate(config.task, _partial_=True)(model=model, optimization=optimization)
    if config.model.get("transformer"):
        batch, note = _latent_batch(model, config.data.batch_size, latents), "transformer only, on stored latents"

        def loss(batch: dict) -> Tensor:
            return model.transformer(**batch).float().square().mean()
    else:
        batch, note = _batch(config, task)

        def loss(batch: dict) -> Tensor:
            clips = repeat_clips(
                task.on_after_batch_transfer(batch, 0), task._times({"video": batch["video"][:, None]})
            )
            if task.augment is not None:
                clips = {**clips, "video": task.augment(clips["video"])}
            return task.shared_step(clips, "train")["loss"]

    def optimizer() -> torch.optim.Optimizer:
        made = optimization.optimizer(task.parameter_groups())
        for group in made.param_groups if on_gpu else ():
            group["foreach"] = True
        return made

    name, _, kind = str(config.trainer.get("precision", "32-true")).partition("-")
    dtype = DTYPES[name]
    cost = trace(task, loss, optimizer, batch, dtype if kind == "true" else None, dtype if kind == "mixed" else None)
    return cost, len(next(iter(batch.values()))), note


def _batch(config: DictConfig, task: Any) -> tuple[dict, str]:
    """Returns a training batch of the data, or blank clips if the data are not on this machine."""
    try:
        data = instantiate(config.data)
    except InstantiationException as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        clips = _blank_clip(config)
        return collate([clips] * config.data.batch_size), f"blank clips of the same size: {error.__cause__}"
    task.trainer = instantiate(config.trainer, **ONE_PROCESS, **QUIET)
    task.trainer.datamodule = data
    task.setup("fit")
    return next(iter(data.train_dataloader())), ""


def _blank_clip(config: DictConfig) -> dict:
    settings = config.data.train
    frames, size = settings.get("num_frames"), settings.get("image_size")
    if frames is None or size is None:
        raise ValueError(
            "the clips of data.train are not on this machine, and without num_frames and image_size their size is "
            "unknown: set data.train.root to an existing folder."
        )
    height, width = (size, size) if isinstance(size, int) else size
    labels = {str(name): 0 for name in config.model.get("num_classes") or ()}
    video = torch.zeros(frames, 3, height, width, dtype=torch.uint8)
    return {"video": video, "id": "blank", "caption": "", "labels": labels}


def _latent_batch(model: Any, batch_size: int, size: tuple[int, ...]) -> dict:
    shape = model.shape
    batch = {
        "latents": torch.zeros(batch_size, shape.in_channels, *size),
        "timestep": torch.zeros(batch_size, size[0]) if shape.causal_chunk else torch.zeros(batch_size),
        "text": torch.zeros(batch_size, TEXT_TOKENS, shape.text_dim),
    }
    if shape.pooled_dim:
        batch["pooled"] = torch.zeros(batch_size, shape.pooled_dim)
    if shape.embedded_guidance:
        batch["guidance"] = torch.full((batch_size,), 6.0)
    return batch


if __name__ == "__main__":
    with OneParagraphErrors():
        main()
