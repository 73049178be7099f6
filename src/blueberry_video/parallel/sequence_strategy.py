"""Lightning strategy of sequence parallelism, ``trainer=sequence_parallel``."""

from typing import Any

import lightning
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from torch.distributed.device_mesh import init_device_mesh

from blueberry_video.parallel.sequence import KEY, SequenceGroup, sequence_parallel


class SplitsClips(ParallelStrategy):
    """Mixin that adds sequence parallelism to a strategy that averages gradients over all processes.

    A subclass lists it before that strategy and sets ``sequence_parallel``. The processes become a mesh
    (data, sequence): consecutive processes form a sequence group, which loads the same clips, draws the same random
    numbers and computes the same loss, each process with a part of the activations. Models split clips in training,
    validation and test steps only; callbacks and evaluations call whole models.

    Attributes:
        sequence_parallel: processes of a group; it divides the number of processes.
        sequence_group: the group of this process; ``None`` before the processes are connected.

    Raises:
        ValueError: for a size that does not divide the number of processes, or a model that does not split clips.
    """

    sequence_parallel: int
    sequence_group: SequenceGroup | None = None

    def setup_environment(self) -> None:
        size, processes = self.sequence_parallel, self._number_of_processes
        if size < 1 or processes % size:
            divisors = [str(divisor) for divisor in range(1, processes + 1) if processes % divisor == 0]
            raise ValueError(
                f"{KEY}={size} must divide the number of processes, {processes}: use {KEY}={' or '.join(divisors)}, or "
                "change trainer.devices."
            )
        super().setup_environment()
        shape = (processes // size, size)
        mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("data", "sequence"))
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
        size = self.sequence_parallel
        return {"num_replicas": self._number_of_processes // size, "rank": self.global_rank // size}

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with sequence_parallel(self.sequence_group):
            return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with sequence_parallel(self.sequence_group):
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with sequence_parallel(self.sequence_group):
            return super().test_step(*args, **kwargs)

    @property
    def _number_of_processes(self) -> int:
        return len(self.parallel_devices or ()) * int(getattr(self, "num_nodes", 1))


class SequenceParallelStrategy(SplitsClips, DDPStrategy):
    """DDP in which groups of processes share the frames or tokens of each clip, see :class:`SplitsClips`.

    Args:
        sequence_parallel: processes of a group; 1 is DDP.
        find_unused_parameters: see ``torch.nn.parallel.DistributedDataParallel``.
    """

    def __init__(self, sequence_parallel: int = 2, find_unused_parameters: bool = False):
        super().__init__(find_unused_parameters=find_unused_parameters)
        self.sequence_parallel = sequence_parallel
