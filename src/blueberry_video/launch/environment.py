"""Launch environment of this process: started by the user, by :mod:`~blueberry_video.launch.processes`, by ``torchrun``
or by ``srun``. Only this module reads the variables that the launchers set. Does not import torch."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

FOLDER_VARIABLE = "BLUEBERRY_VIDEO_RUN_FOLDER"  # of processes.start
RESERVED_STEPS = 0xFFFFFFF0  # Slurm's ids of batch scripts and interactive shells, which are no tasks of srun
PORTS = range(15000, 32000)  # below those that the kernel gives to clients

Launcher = Literal["standalone", "rank", "torchrun", "slurm"]


class Environment(NamedTuple):
    """Launcher of this process, and its position among the processes of the run.

    Attributes:
        launcher: ``standalone``: the user started this process, and it starts a process per device; ``rank``: it is
            one of those; ``torchrun`` and ``slurm``: one of the processes that ``torchrun`` or ``srun`` started, one
            per device.
        rank: index of the process; ``world_size`` processes train together.
        local_rank: index on its node, ``node_rank``, which has ``local_world_size`` of the processes.
        address, port: store of ``torch.distributed``; empty and 0 for ``standalone``.
        hosts_store: whether rank 0 starts the store, in place of ``torchrun`` or of the process that started it.
        key: distinguishes jobs and restarts that use the same store.
    """

    launcher: Launcher = "standalone"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    address: str = ""
    port: int = 0
    hosts_store: bool = False
    key: str = ""

    @property
    def is_external(self) -> bool:
        """Whether ``torchrun`` or ``srun`` started all processes of the run."""
        return self.launcher in ("torchrun", "slurm")

    @property
    def follows(self) -> bool:
        """Whether a different process creates the run folder and writes the report."""
        return self.launcher == "rank" or (self.is_external and self.rank > 0)

    def variables(self) -> dict[str, str]:
        """Returns the variables from which ``torch.distributed`` and libraries read the position."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "GROUP_RANK": str(self.node_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def recognize(variables: Mapping[str, str] = os.environ, in_terminal: bool | None = None) -> Environment:
    """Returns the launch environment.

    A batch script and an interactive shell of Slurm have the variables of a job with several tasks, but are none of
    them: commands in them are ``standalone``, as is a step of ``srun`` with one task.

    Args:
        variables: of the process.
        in_terminal: whether its input is a terminal, as in ``srun --pty``; by default read from ``sys.stdin``.
    """
    has_position = all(name in variables for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))
    if variables.get(FOLDER_VARIABLE):
        return _from_variables("rank", variables)
    if has_position:
        return _from_variables("torchrun", variables)
    if in_terminal is None:
        in_terminal = sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()
    if _is_task(variables) and not in_terminal:
        return _from_slurm(variables)
    return Environment()


def check(trainer: Mapping[str, Any], here: Environment, command: str) -> None:
    """Checks that the number of processes is ``trainer.devices`` times ``trainer.num_nodes``.

    Args:
        trainer: the ``trainer`` of the config.
        here: the launch environment.
        command: the arguments of ``blueberry_video.train``, for the message.

    Raises:
        ValueError: if it is not; names a command that starts them.
    """
    nodes, devices = int(trainer.get("num_nodes") or 1), device_count(trainer)
    if here.launcher == "rank":
        return
    if not here.is_external:
        if nodes > 1:
            tasks = devices or 8
            raise ValueError(
                f"trainer.num_nodes={nodes}: this command starts the processes of one machine only. In a Slurm job, "
                f"start all of them with `srun --nodes={nodes} --ntasks-per-node={tasks} blueberry train …`; without "
                f"Slurm, run on each machine `torchrun --nnodes={nodes} --nproc-per-node={tasks} "
                f"--rdzv-backend=c10d --rdzv-endpoint=<first machine>:29500 -m blueberry_video.train {command}`."
            )
        return
    local = devices or here.local_world_size
    if local * nodes == here.world_size and local == here.local_world_size:
        return
    name = "torchrun" if here.launcher == "torchrun" else "srun"
    fix = ""
    if here.world_size % here.local_world_size == 0:
        fitting = here.world_size // here.local_world_size
        fix = f"Set trainer.devices={here.local_world_size} trainer.num_nodes={fitting}, or start "
    else:
        fix = "Start "
    shown = trainer.get("devices", 1)
    shown = [*shown] if isinstance(shown, Sequence) and not isinstance(shown, str) else shown
    option = "--nproc-per-node" if here.launcher == "torchrun" else "--ntasks-per-node"
    count = "--nnodes" if here.launcher == "torchrun" else "--nodes"
    raise ValueError(
        f"trainer.devices={shown} and trainer.num_nodes={nodes} require {local * nodes} processes, {local} on each "
        f"machine, but {name} started {here.world_size}, {here.local_world_size} on this machine. {fix}{local} on "
        f"each of {nodes}: `{name} {count}={nodes} {option}={local}`."
    )


def device_count(trainer: Mapping[str, Any]) -> int | None:
    """Returns ``trainer.devices`` as a number; None for all devices of the machine."""
    devices = trainer.get("devices", 1)
    if isinstance(devices, Sequence) and not isinstance(devices, str):  # in a config, a ListConfig
        return len(devices)
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    return None if devices in (-1, "-1", "auto", None) else int(devices)


def _from_variables(launcher: Launcher, variables: Mapping[str, str]) -> Environment:
    world_size = int(variables.get("WORLD_SIZE", "1"))
    restart = f"{variables.get('TORCHELASTIC_RUN_ID', 'none')}.{variables.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return Environment(
        launcher,
        rank=int(variables.get("RANK", "0")),
        world_size=world_size,
        local_rank=int(variables.get("LOCAL_RANK", "0")),
        local_world_size=int(variables.get("LOCAL_WORLD_SIZE", world_size)),
        node_rank=int(variables.get("GROUP_RANK", "0")),
        address=variables.get("MASTER_ADDR", ""),
        port=int(variables.get("MASTER_PORT", "0")),
        hosts_store=variables.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        key=restart,
    )


def _is_task(variables: Mapping[str, str]) -> bool:
    """Returns whether a process is one of several tasks of a step of ``srun``."""
    step, tasks = variables.get("SLURM_STEP_ID", ""), variables.get("SLURM_STEP_NUM_TASKS", "1")
    is_step = step.isdecimal() and int(step) < RESERVED_STEPS
    return is_step and "SLURM_PROCID" in variables and tasks.isdecimal() and int(tasks) > 1


def _from_slurm(variables: Mapping[str, str]) -> Environment:
    job, step, node = variables["SLURM_JOB_ID"], variables["SLURM_STEP_ID"], int(variables.get("SLURM_NODEID", "0"))
    nodes = variables.get("SLURM_STEP_NODELIST") or variables["SLURM_JOB_NODELIST"]
    tasks = tasks_per_node(variables.get("SLURM_STEP_TASKS_PER_NODE", variables["SLURM_STEP_NUM_TASKS"]))
    port = PORTS[(int(job) * 97 + int(step)) % len(PORTS)]
    return Environment(
        "slurm",
        rank=int(variables["SLURM_PROCID"]),
        world_size=int(variables["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(variables["SLURM_LOCALID"]),
        local_world_size=tasks[node] if node < len(tasks) else tasks[0],
        node_rank=node,
        address=variables.get("MASTER_ADDR") or first_host(nodes),
        port=int(variables.get("MASTER_PORT") or port),
        hosts_store=True,
        key=f"{job}.{step}.{variables.get('SLURM_RESTART_COUNT', '0')}",
    )


def first_host(nodes: str) -> str:
    """Returns the first host of a node list of Slurm: ``gpu[07-09,12],login`` → ``gpu07``."""
    name = re.match(r"[^,\[]*(\[[^\]]*\][^,\[]*)*", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", name[0] if name else nodes)


def tasks_per_node(text: str) -> list[int]:
    """Returns the tasks of each node: ``2(x3),1`` → ``[2, 2, 2, 1]``."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]
