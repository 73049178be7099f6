"""Lightning strategy of sequence parallelism."""

from typing import Any

import lightning
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.device_mesh import init_device_mesh

from blueberry_video.parallel.sequence import KEY, SequenceGroup, sequence_parallel


class SequenceParallelStrategy(DDPStrategy):
    """DDP in which groups of consecutive processes share the frames or tokens of their clips.

    The processes are a mesh (data, sequence): those of a sequence group load the same clips, draw the same random
    numbers and compute the same loss, each with a part of the activations. DDP averages gradients over all processes.
    Models split in training, validation and test steps only; everything else runs as with DDP.

    Args:
        sequence_parallel: processes of a group; it divides the number of processes. 1 is DDP.
        find_unused_parameters: see ``torch.nn.parallel.DistributedDataParallel``.

    Attributes:
        sequence_group: the group of this process; ``None`` before the processes are connected.

    Raises:
        ValueError: for a size that does not divide the number of processes, or a model that does not split clips.
    """

    def __init__(self, sequence_parallel: int = 2, find_unused_parameters: bool = False):
        super().__init__(find_unused_parameters=find_unused_parameters)
        if sequence_parallel < 1:
            raise ValueError(f"{KEY}={sequence_parallel} must be at least 1.")
        self.sequence_parallel = sequence_parallel
        self.sequence_group: SequenceGroup | None = None

    def setup_distributed(self) -> None:
        size, processes = self.sequence_parallel, self.num_nodes * self.num_processes
        if processes % size:
            raise ValueError(
                f"{KEY}={size} must divide the number of processes, {processes}: set trainer.devices="
                f"{size * max(processes // size, 1)}, or {KEY}={processes}."
            )
        super().setup_distributed()
        mesh = init_device_mesh(self.root_device.type, (processes // size, size), mesh_dim_names=("data", "sequence"))
        self.sequence_group = SequenceGroup(mesh.get_group("sequence"))

    def setup(self, trainer: lightning.Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        if self.sequence_parallel > 1 and not any(getattr(part, "splits_clips", False) for part in module.modules()):
            raise ValueError(
                f"{KEY}={self.sequence_parallel} has no effect on {type(module.model).__name__}, which computes whole "
                "clips: use trainer=ddp, or an encoder or transformer that splits them (HydraVideo, "
                "VisionTransformer, CogVideoX, HunyuanVideo)."
            )
        super().setup(trainer)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        processes = self.num_nodes * self.num_processes
        return {"num_replicas": processes // self.sequence_parallel, "rank": self.global_rank // self.sequence_parallel}

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with sequence_parallel(self.sequence_group):
            return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with sequence_parallel(self.sequence_group):
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with sequence_parallel(self.sequence_group):
            return super().test_step(*args, **kwargs)
