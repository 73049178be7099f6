"""Cluster profiles: the resources of submitted jobs, in ``conf/cluster/<name>.yaml``."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blueberry_video.config import CONF, did_you_mean
from blueberry_video.config.text import explain_yaml, first_line, short, shown
from blueberry_video.launch.environment import device_count

EXECUTORS = ("local", "debug", "slurm")


@dataclass
class Cluster:
    """Profile of a cluster.

    Attributes:
        executor: ``slurm``; ``local``: processes of this machine, in the background; ``debug``: in the foreground.
        partition, account, qos: as of ``sbatch``; null: its defaults.
        hours: time limit of a job of Slurm.
        nodes: number of nodes; null: ``trainer.num_nodes``, which it must equal.
        gpus_per_node: GPUs of a node that a job reserves. ``trainer.devices=-1`` uses all of them.
        cpus_per_task: cores of each process; there is one process per device. null: default of Slurm.
        mem: memory of each node, as ``64GB``; null: default of Slurm.
        signal_seconds: time between SIGUSR1, after which a run saves a checkpoint, and the time limit.
        requeue: whether a job that was preempted, or reached its time limit, is queued again and continues.
        at_once: largest number of points of a sweep that run at once; null: no limit, and 1 for ``local``.
        setup: lines of the batch script before the command.
        sbatch: further options of ``sbatch``, without dashes, as ``{constraint: a100}``.
    """

    executor: str = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    hours: float = 24.0
    nodes: int | None = None
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    mem: str | None = None
    signal_seconds: int = 120
    requeue: bool = True
    at_once: int | None = None
    setup: list[str] = field(default_factory=list)
    sbatch: dict[str, Any] = field(default_factory=dict)


KEYS = [item.name for item in fields(Cluster)]


def load(name: str, overrides: Sequence[str] = ()) -> Cluster:
    """Returns a profile.

    Args:
        name: a file, or the name of one in ``conf/cluster/`` of the working directory or of this project.
        overrides: ``key=value`` of the profile.

    Raises:
        FileNotFoundError: there is no such profile.
        ValueError: a key or a value is not valid; the message names it.
    """
    file = _find(name)
    try:
        content: Any = OmegaConf.load(file)
    except yaml.YAMLError as error:
        raise ValueError(explain_yaml(error, file)) from error
    if not isinstance(content, DictConfig):
        raise ValueError(f"{shown(file)} must be a YAML mapping of keys to values.")
    _check_keys(list(map(str, content)), shown(file))
    try:
        profile = OmegaConf.merge(OmegaConf.structured(Cluster), content)
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals:
                raise ValueError(f"`cluster.{override}` has no value: write `cluster.{key}=…`.")
            _check_keys([key.partition(".")[0]], f"`cluster.{override}`")
            OmegaConf.update(profile, key, yaml.safe_load(value))
        cluster = cast(Cluster, OmegaConf.to_object(profile))
    except OmegaConfBaseException as error:
        raise ValueError(f"`cluster.{error.full_key}` in {shown(file)} is invalid: {first_line(error)}.") from error
    _check(cluster, shown(file))
    return cluster


def minutes(cluster: Cluster) -> int:
    """Returns the time limit in minutes, rounded up."""
    return max(1, math.ceil(cluster.hours * 60))


def tasks(cluster: Cluster, trainer: DictConfig) -> tuple[int, int]:
    """Returns the numbers of nodes and of processes on each node: one process per device of a run.

    Raises:
        ValueError: if the profile does not have the nodes or GPUs that the run needs.
    """
    nodes, devices = int(trainer.get("num_nodes") or 1), trainer.get("devices", 1)
    if cluster.nodes not in (None, nodes):
        raise ValueError(
            f"cluster.nodes={cluster.nodes} and trainer.num_nodes={nodes} must be equal: write `cluster.nodes={nodes}` "
            f"or `trainer.num_nodes={cluster.nodes}`."
        )
    uses_gpus = trainer.get("accelerator", "auto") in ("gpu", "cuda") or (
        trainer.get("accelerator", "auto") == "auto" and cluster.gpus_per_node > 0
    )
    number = device_count(trainer) or (cluster.gpus_per_node if uses_gpus else 1)
    if uses_gpus and cluster.executor == "slurm" and not 0 < number <= cluster.gpus_per_node:
        raise ValueError(
            f"trainer.accelerator={trainer.get('accelerator')}, trainer.devices={devices} needs {max(number, 1)} GPUs "
            f"of a node, and cluster.gpus_per_node={cluster.gpus_per_node}: write "
            f"`cluster.gpus_per_node={max(number, 1)}`, or train on the CPU with `trainer=cpu`."
        )
    if nodes > 1 and cluster.executor != "slurm":
        raise ValueError(
            f"trainer.num_nodes={nodes} needs a cluster, and cluster.executor={cluster.executor} is this machine: name "
            "a profile with `executor: slurm` (CLUSTER=<name>)."
        )
    return nodes, number


def _find(name: str) -> Path:
    folders = [Path("conf/cluster").absolute(), CONF / "cluster"]
    files = [Path(name).absolute()] if name.endswith(".yaml") else [folder / f"{name}.yaml" for folder in folders]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        names = {file.stem for folder in folders for file in folder.glob("*.yaml")}
        raise FileNotFoundError(
            f"--cluster {name} (CLUSTER={name}): {shown(files[0])} does not exist. {did_you_mean(name, names)}"
        )
    return found


def _check_keys(keys: Sequence[str], source: str) -> None:
    for key in keys:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"Did you mean `{near[0]}`?" if near else f"The keys are: {', '.join(KEYS)}."
            raise ValueError(f"`{key}` in {source} is not a key of a cluster profile. {hint}")


def _check(cluster: Cluster, source: str) -> None:
    if cluster.executor not in EXECUTORS:
        raise ValueError(
            f"`executor: {short(cluster.executor)}` in {source} is not an executor. "
            f"{did_you_mean(cluster.executor, EXECUTORS)}"
        )
    for key, least in (("hours", 0), ("nodes", 1), ("cpus_per_task", 1), ("at_once", 1), ("signal_seconds", 1)):
        value = getattr(cluster, key)
        if value is not None and (value < least or value == 0):
            raise ValueError(f"`{key}: {value}` in {source} must be {f'at least {least}' if least else 'positive'}.")
    if cluster.gpus_per_node < 0:
        raise ValueError(f"`gpus_per_node: {cluster.gpus_per_node}` in {source} must be at least 0.")
