"""Training of tiny tasks on two processes, with DDP and FSDP2, for ``test_fsdp.py``."""

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from blueberry_video.callbacks import EMA, Media, NaNGuard, StepSeed
from blueberry_video.data.datamodule import DataModule
from blueberry_video.data.moving_shapes import MovingShapes
from blueberry_video.data.sprites import Sprites
from blueberry_video.diffusion.guidance import ConstantGuidance
from blueberry_video.diffusion.lora import LoRA
from blueberry_video.diffusion.objectives import FlowMatching
from blueberry_video.diffusion.samplers import DDIM
from blueberry_video.diffusion.text_to_video import TextToVideo
from blueberry_video.diffusion.timesteps import UniformTimesteps
from blueberry_video.evaluation.collapse import CollapseMonitor
from blueberry_video.evaluation.generated_shapes import GeneratedShapes
from blueberry_video.experiment.checkpoint import AtomicCheckpointIO, Checkpoints
from blueberry_video.masking import RandomMasking
from blueberry_video.models.autoencoder.base import Pixels
from blueberry_video.models.classifier import VideoClassifier
from blueberry_video.models.cogvideox.model import CogVideoX
from blueberry_video.models.jepa.model import JEPA
from blueberry_video.models.text_encoder.words import WordText
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.optim import constant, ramp
from blueberry_video.parallel.fsdp import gathered, parallelize
from blueberry_video.parallel.strategy import FullyShardedStrategy
from blueberry_video.tasks.classification import Classification
from blueberry_video.tasks.diffusion import Diffusion
from blueberry_video.tasks.latent_prediction import LatentPrediction
from blueberry_video.tasks.settings import Optimization

STEPS = 4


def optimization(layer_decay: float = 1.0) -> Optimization:
    return Optimization(partial(torch.optim.AdamW, lr=3e-3), constant, layer_decay=layer_decay)


def encoder(**changes: Any) -> VisionTransformer:
    # widths that 2 does not divide leave parts of different sizes
    return VisionTransformer(16, 4, 8, 2, embed_dim=24, depth=2, num_heads=2, **changes)


def jepa() -> LatentPrediction:
    network = JEPA(encoder(positions="rope_3d", qkv_bias="qkv"), 12, 1, 2, num_mask_tokens=2)
    maskings = [RandomMasking(0.5), RandomMasking(0.75)]
    return LatentPrediction(network, optimization(), maskings, partial(ramp, start=0.9, end=0.9))


def classifier() -> Classification:
    return Classification(VideoClassifier(encoder(), {"motion": len(Sprites.classes["motion"])}), optimization(0.5))


def lora(checkpointing: bool = False) -> Diffusion:
    sizes = {"num_heads": 2, "head_dim": 16, "depth": 2, "in_channels": 3, "out_channels": 3, "text_dim": 8}
    sizes |= {"text_len": 8, "time_dim": 16, "patch_size": 8, "num_frames": 8, "height": 16, "width": 16}
    transformer = CogVideoX(**sizes, positions="rope", zero_init=False, checkpointing=checkpointing)
    network = TextToVideo(transformer, WordText(8, 8), Pixels(), LoRA(rank=2))
    parts = (FlowMatching(), UniformTimesteps(), DDIM(2), ConstantGuidance(2.0))
    return Diffusion(network, optimization(), *parts)


def data(task: Any, batch_size: int) -> DataModule:
    if isinstance(task, Diffusion):
        return DataModule(MovingShapes("train", 1), MovingShapes("val", 1, 8), batch_size=batch_size)
    train, val = (Sprites(split, size, num_frames=4, image_size=16) for split, size in (("train", 32), ("val", 8)))
    return DataModule(train, val, batch_size=batch_size)


class Record(lightning.pytorch.Callback):
    """Records losses and gradient norms."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.norms.append(float(trainer.callback_metrics["train/grad_norm"]))


def train(
    task: Any,
    folder: Path,
    strategy: Any,
    *callbacks: Any,
    processes: int = 2,
    resume: Path | None = None,
    steps: int = STEPS,
    precision: str = "32-true",
) -> dict[str, Any]:
    """Trains a task with clipping, EMA and checkpoints every 2 steps; returns what it recorded."""
    folder.mkdir(exist_ok=True)
    record = Record()
    first = [StepSeed(0), NaNGuard(), record, Checkpoints(2, keep=9), EMA(0.9)]
    trainer = lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        precision=precision,  # type: ignore[arg-type]
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=0.05,
        callbacks=[*first, *callbacks],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        limit_val_batches=1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    trainer.fit(task, data(task, 8 // processes), ckpt_path=resume, weights_only=True)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"losses": record.losses, "norms": record.norms, "metrics": metrics}


def compiled() -> Diffusion:
    task = lora(checkpointing=True)
    for block in task.model.transformer.transformer_blocks:
        block.compile(backend="eager")
    return task


class Narrow(torch.nn.Module):
    """Two blocks that record the dtype of their weights while they run."""

    block_lists = ("blocks",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(2))
        self.dtypes: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            block.register_forward_pre_hook(lambda module, _: self.dtypes.append(module.weight.dtype))
            with torch.autocast("cpu", torch.bfloat16):
                x = block(x)
        return x.float()


def narrow(rank: int) -> dict[str, Any]:
    """Returns gradients of blocks that are gathered in bfloat16, of a different batch on each process."""
    torch.manual_seed(rank)
    module = Narrow()
    start = broadcast_weights(module)
    batches = [torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    parallelize(module, init_device_mesh("cpu", (2,)), torch.bfloat16)
    module(batches[rank]).square().mean().backward()
    gradients = {name: weight.grad.full_tensor() for name, weight in module.named_parameters()}  # type: ignore
    with gathered(module):
        inside = {name: weight.dtype for name, weight in module.named_parameters()}
    dtypes = {weight.dtype for weight in module.parameters()}
    return {"start": start, "gradients": gradients, "dtypes": module.dtypes, "inside": inside, "outside": dtypes}


def broadcast_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    for weight in found.values():
        torch.distributed.broadcast(weight, 0)
    return found


def sharded() -> FullyShardedStrategy:
    return FullyShardedStrategy("sharded")


def work(rank: int, folder: str, single: str) -> None:
    """Process of the group: trains everything and saves what it recorded in ``results.pt``."""
    warnings.simplefilter("ignore")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(Path(folder, "store")), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    results = runs(rank, Path(folder), Path(single))
    if rank == 0:
        torch.save(results, Path(folder, "results.pt"))
    torch.distributed.barrier()
    os._exit(0)  # trainers and meshes still refer to the group, see gloo_group.py


def runs(rank: int, folder: Path, single: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def run(name: str, build: Callable[[], Any], strategy: Any, *callbacks: Any, **options: Any) -> None:
        torch.manual_seed(rank)  # the other processes get the weights of the first
        found[name] = train(build(), folder / name, strategy, *callbacks, **options)

    for name, build, make in (
        ("jepa", jepa, lambda: [CollapseMonitor(every_n_steps=2)]),
        ("lora", lora, lambda: [Media(2), GeneratedShapes(36, 36)]),
        ("classifier", classifier, list),
    ):
        run(f"{name}-ddp", build, "ddp", *make())
        run(f"{name}-fsdp", build, FullyShardedStrategy(), *make())
    run("compiled-fsdp", compiled, FullyShardedStrategy())
    run("jepa-sharded", jepa, sharded())
    run("jepa-resumed", jepa, sharded(), resume=folder / "jepa-sharded/checkpoints/step_00000002.shards")
    run("jepa-full-resumed", jepa, sharded(), resume=folder / "jepa-fsdp/checkpoints/step_00000002.ckpt")
    run("from-one", classifier, sharded(), resume=single / "checkpoints/step_00000002.shards")
    run("bf16-ddp", classifier, "ddp", precision="bf16-mixed")
    run("bf16-fsdp", classifier, FullyShardedStrategy(), precision="bf16-mixed")
    found["narrow"] = narrow(rank)
    return found


def one(folder: str, kill: bool) -> None:
    """Trains the classifier in one process with sharded checkpoints; the save of the last step is killed halfway."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if kill:
        from blueberry_video.parallel import sharded_checkpoint

        hash_file = sharded_checkpoint._sha256

        def die(path: Path) -> str:
            if "step_00000004" in str(path):
                os.kill(os.getpid(), 9)
            return hash_file(path)

        sharded_checkpoint._sha256 = die
    torch.manual_seed(0)
    train(classifier(), Path(folder), sharded(), processes=1)


def tensors(path: Path) -> dict[str, Tensor]:
    """Returns all tensors of a checkpoint by their path in it."""
    found: dict[str, Tensor] = {}

    def add(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                add(item, f"{name}/{key}")
        elif isinstance(value, list | tuple):
            for number, item in enumerate(value):
                add(item, f"{name}/{number}")

    add(AtomicCheckpointIO().load_checkpoint(path), "")
    return found
