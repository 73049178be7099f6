"""Lightning strategy of fully sharded training, ``trainer=fsdp``."""

from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.optim import Optimizer

from blueberry_video.parallel.fsdp import full, map_tensors, parallelize, shard_like
from blueberry_video.parallel.sharded_checkpoint import checked_shards, is_sharded, read_shards

STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2: parameters, gradients and optimizer states are sharded over all processes, block by block.

    Unlike its base class it needs no ``configure_model``: it shards the task with
    :func:`~blueberry_video.parallel.fsdp.parallelize`, after ``setup`` and before the optimizer is built. A step of the
    task gathers the parameters outside blocks, and a block its own.

    A checkpoint has the same contents as without sharding, so that a run resumes with any strategy and on any number
    of processes.

    Args:
        checkpoints: ``"full"``: one file, which the first process collects and writes. ``"sharded"``: a folder, to
            which every process writes its part; for models that do not fit in the memory of one machine.
        process_group_backend: ``"nccl"`` or ``"gloo"``; ``None`` for that of the device.

    Raises:
        ValueError: for another value of ``checkpoints``.
    """

    def __init__(
        self, checkpoints: Literal["full", "sharded"] = "full", process_group_backend: str | None = None
    ) -> None:
        if checkpoints not in ("full", "sharded"):
            raise ValueError(f"trainer.strategy.checkpoints={checkpoints!r} must be 'full' or 'sharded'.")
        super().__init__(save_distributed_checkpoint=False, process_group_backend=process_group_backend)
        self.checkpoints = checkpoints
        self._buffers: list[Tensor] = []  # of the state dict

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        ParallelStrategy.setup_environment(self)
        self._setup_distributed()
        if self._device_mesh is None:
            self._device_mesh = init_device_mesh(
                self.root_device.type, (self.world_size,), mesh_dim_names=("data_parallel",)
            )

    def setup(self, trainer: Trainer) -> None:
        task, accelerator = self.lightning_module, self.accelerator
        assert task is not None
        assert accelerator is not None
        accelerator.setup(trainer)
        if not isinstance(task, FSDPModule):  # validation after training: sharded already
            self.precision_plugin.convert_module(task)
            is_narrow = str(trainer.precision) == "bf16-mixed" and self.root_device.type == "cuda"
            # autocast of the CPU does not convert 16-bit weights of norms, that of CUDA does
            parallelize(task, self.device_mesh, torch.bfloat16 if is_narrow else None)
            for method in STEPS:
                register_fsdp_forward_method(task, method)
        task.to(self.root_device)  # frozen parts that are no parameters
        saved = task.state_dict().keys()
        self._buffers = [buffer for name, buffer in task.named_buffers() if name in saved]
        self.model = task
        self.barrier()
        fits = trainer.state.fn == TrainerFn.FITTING
        if fits:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fits:
            _optimizers_to_device(self.optimizers, self.root_device)

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        """Training step; first gives the buffers of the state dict the values of the first process, as DDP does."""
        if self.world_size > 1:
            for buffer in self._buffers:
                dist.broadcast(buffer, 0)
        return super().training_step(*arguments, **options)

    # ---- checkpoints ----

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return ParallelStrategy.optimizer_state(self, optimizer)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        ParallelStrategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        ParallelStrategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint; all processes must call it. The plugin of the trainer writes files and folders."""
        if self.checkpoints == "sharded":
            self.checkpoint_io.save_checkpoint(checkpoint, Path(self.broadcast(str(filepath))))
            return

        def collect(tensor: Tensor) -> Tensor:  # one at a time
            whole = full(tensor)
            return tensor if whole is tensor else whole.cpu() if self.is_global_zero else torch.empty(0)

        ParallelStrategy.save_checkpoint(self, map_tensors(checkpoint, collect), filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint of any number of processes; its tensors are sharded as those of the model."""
        path = Path(self.broadcast(str(checkpoint_path)))
        if is_sharded(path):
            return read_shards(checked_shards(path), self.device_mesh)
        return self._sharded(self.checkpoint_io.load_checkpoint(path, weights_only=weights_only))

    def _sharded(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Shards the tensors of a whole checkpoint that belong to sharded parameters."""
        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters())
        for key in checkpoint.keys() & {"state_dict", "current_model_state"}:  # the latter: with an EMA
            for name, value in checkpoint[key].items():
                if name in parameters and value.shape == parameters[name].shape:
                    checkpoint[key][name] = shard_like(value, parameters[name])
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", ())):
            for group, saved in zip(optimizer.param_groups, state["param_groups"]):
                for parameter, number in zip(group["params"], saved["params"]):
                    values = state["state"].get(number, {})
                    for name, value in values.items():
                        if isinstance(value, Tensor) and value.shape == parameter.shape:
                            values[name] = shard_like(value, parameter)
        return checkpoint
