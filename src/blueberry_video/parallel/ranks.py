"""Position of a process among those that load different clips."""

from typing import Any


def data_rank(trainer: Any) -> int:
    """Index of the group of processes that shares the clips of this one: its rank, without sequence parallelism."""
    return trainer.global_rank // _sequence_size(trainer)


def data_world_size(trainer: Any) -> int:
    """Number of groups of processes with different clips: the number of processes, without sequence parallelism."""
    return trainer.world_size // _sequence_size(trainer)


def _sequence_size(trainer: Any) -> int:
    return getattr(getattr(trainer, "strategy", None), "sequence_parallel", 1)
