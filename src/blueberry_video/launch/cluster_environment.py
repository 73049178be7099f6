"""Launch environment in the form that Lightning's strategies read."""

from collections.abc import Mapping
from typing import Any

from lightning.fabric.plugins import ClusterEnvironment

from blueberry_video.launch.environment import Environment, device_count, recognize


def trainer_options(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments ``plugins`` and, for all devices, ``devices`` of the Trainer of this process.

    Args:
        trainer: its other arguments.
    """
    here = recognize()
    options: dict[str, Any] = {"plugins": [*(trainer.get("plugins") or ()), LaunchedProcesses(here)]}
    if here.is_external and device_count(trainer) is None:
        options["devices"] = here.local_world_size
    return options


class LaunchedProcesses(ClusterEnvironment):
    """Plugin of a Trainer in a process that is already one of the processes of the run.

    Used in place of Lightning's own environments: these would start processes of their own, or, in a Slurm job, save
    checkpoints outside of ``checkpoints/`` and requeue the job at a signal.

    Args:
        here: the environment of this process.
    """

    def __init__(self, here: Environment) -> None:
        super().__init__()
        self._here = here

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self._here.address or "127.0.0.1"

    @property
    def main_port(self) -> int:
        return self._here.port

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._here.world_size

    def set_world_size(self, size: int) -> None:
        """Does nothing: the launcher sets the size."""

    def global_rank(self) -> int:
        return self._here.rank

    def set_global_rank(self, rank: int) -> None:
        """Does nothing: the launcher sets the rank."""

    def local_rank(self) -> int:
        return self._here.local_rank

    def node_rank(self) -> int:
        return self._here.node_rank
