"""Submission of points to Slurm, or to processes of this machine, without waiting for them.

A submission has a folder, ``outputs/<experiment>/submissions/<time>/``, with ``sweep.json``, a record of each point,
the snapshot of the code, and ``logs/``. A sweep is one array job. Each job trains its point as ``train`` does.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blueberry_video.installation import install_command
from blueberry_video.launch import points, pool
from blueberry_video.launch.cluster import Cluster, minutes
from blueberry_video.launch.point_job import PointJob
from blueberry_video.launch.scheduler import REQUEUE_VARIABLE
from blueberry_video.launch.sweep_folder import SweepFolder

LOCAL_MINUTES = 60 * 24 * 365  # time limit of a background process, which submitit requires


def submit(
    folder: SweepFolder,
    numbers: Sequence[int],
    resources: Mapping[int, tuple[int, int]],
    cluster: Cluster,
    environment: Mapping[str, str],
    name: str,
    slots: Sequence[dict[str, str]] = ({},),
) -> dict[str, str]:
    """Submits points that are recorded in a folder; the ``command`` of a record is the arguments of ``train``.

    Args:
        folder: the folder of the submission.
        numbers: the points.
        resources: numbers of nodes and of processes on each node, by point.
        cluster: the profile.
        environment: environment variables that select the code, see :class:`Snapshot`.
        name: name of the jobs.
        slots: for processes of this machine, the environment variables of each that runs at once.

    Returns:
        The job of each point, ``<id>`` or ``<id>_<index>``; of processes of this machine, the id of their parent.

    Raises:
        RuntimeError: if the scheduler refuses a job; the jobs that were submitted before it are canceled.
        ImportError: if submitit is not installed.
    """
    if cluster.executor == "debug":
        pool.run(folder.path, slots, retry=True, code=environment, foreground=True)
        return {}
    try:
        import submitit
    except ImportError as error:
        raise ImportError(f"submitit is not installed: `{install_command('cluster', 'submitit')}`.") from error
    folder.unlock()
    logs = folder.path.absolute() / "logs"
    here = os.getcwd()
    if cluster.executor == "local":
        folder.update(slots=[*slots])
        words = ["blueberry_video.launch.pool", str(folder.path)]
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES")  # submitit hides all GPUs
        background = submitit.LocalExecutor(folder=logs)
        background.update_parameters(timeout_min=LOCAL_MINUTES)
        os.environ.update(environment)
        folder.unlock()  # for the process that runs the points
        job = background.submit(PointJob(words, here, {**environment, "CUDA_VISIBLE_DEVICES": gpus}, session=True))
        return {str(number): job.job_id for number in numbers}
    check_slurm()
    executor = submitit.SlurmExecutor(folder=logs)
    submitted: dict[str, str] = {}
    try:
        for nodes, tasks in dict.fromkeys(resources[number] for number in numbers):
            group = [number for number in numbers if resources[number] == (nodes, tasks)]
            executor.parameters = {}
            executor.update_parameters(**slurm_parameters(cluster, environment, name, nodes, tasks))
            records = {record["number"]: record for record in points.read(folder.path)}
            jobs = executor.submit_array(
                [_job(folder.path, records[number], here, cluster, environment) for number in group]
            )
            submitted.update({str(number): job.job_id for number, job in zip(group, jobs, strict=True)})
    except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
        for job_id in {job.partition("_")[0] for job in submitted.values()}:
            cancel(job_id)
        text = " ".join(str(getattr(error, "stderr", None) or error).split())
        found = re.search(r"sbatch: error: (.*)", text)
        raise RuntimeError(
            f"sbatch refused the job: {found[1] if found else text}. Correct the profile in conf/cluster/, or a key of "
            "it with `cluster.<key>=…`; `sinfo` lists the partitions. No job is left in the queue."
        ) from error
    return submitted


def slurm_parameters(
    cluster: Cluster, environment: Mapping[str, str], name: str, nodes: int, tasks: int
) -> dict[str, Any]:
    """Returns the parameters of submitit's ``SlurmExecutor`` for a profile."""
    options = {
        "signal": f"USR1@{cluster.signal_seconds}",
        **({"requeue": True} if cluster.requeue else {"no-requeue": True}),
        **cluster.sbatch,
    }
    exports = [f"export {key}={shlex.quote(value)}" for key, value in environment.items()]
    parameters = {
        "job_name": name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": minutes(cluster),
        "nodes": nodes,
        "ntasks_per_node": tasks,
        "gpus_per_node": cluster.gpus_per_node or None,
        "cpus_per_task": cluster.cpus_per_task,
        "mem": cluster.mem,
        "array_parallelism": cluster.at_once,
        "setup": [*cluster.setup, *exports],
        "additional_parameters": options,
    }
    return {key: value for key, value in parameters.items() if value is not None}


def cancel(job: str) -> None:
    subprocess.run(["scancel", job], check=False)


def check_slurm() -> None:
    """Checks that Slurm is installed.

    Raises:
        RuntimeError: it is not.
    """
    if missing := [command for command in ("sbatch", "srun") if shutil.which(command) is None]:
        raise RuntimeError(
            f"cluster.executor=slurm, and this machine has no {missing[0]}: submit on a login node of the cluster, or "
            "name a profile for this machine, `--cluster local` (CLUSTER=local)."
        )


def _job(
    folder: Path, record: Mapping[str, Any], here: str, cluster: Cluster, environment: Mapping[str, str]
) -> PointJob:
    variables = {**environment, points.FILE_VARIABLE: str(points.file_of(folder.absolute(), record["number"]))}
    variables[REQUEUE_VARIABLE] = "1" if cluster.requeue else "0"
    return PointJob(["blueberry_video.train", *record["command"]], here, variables, threads=cluster.cpus_per_task)
