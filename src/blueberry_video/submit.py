"""Entry point of ``blueberry submit``: an experiment, or a sweep, is submitted to Slurm or to the background.

    python -m blueberry_video.submit --config-dir experiments/<name> [key=value …] [key=a,b …] [--cluster NAME]

Every point is checked before the first one is submitted. ``cluster.<key>=value`` overrides a key of the profile.
"""

import argparse
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from blueberry_video.experiment.git import git_state
from blueberry_video.installation import start_command
from blueberry_video.launch import cluster as clusters
from blueberry_video.launch import command_line, job_states, points, pool, snapshot, submission
from blueberry_video.launch.errors import OneParagraphErrors
from blueberry_video.launch.signals import handled
from blueberry_video.launch.sweep_folder import SweepFolder

ENDED = ("failed", "interrupted", "lost")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="blueberry submit", allow_abbrev=False)
    parser.add_argument("--cluster", default="local", help="a profile: a file, or its name in conf/cluster/")
    parser.add_argument("--at-once", type=int, help="largest number of points of a sweep that run at once")
    parser.add_argument("--resume", help="last, or the name of a submission: submit its points that did not finish")
    parser.add_argument("--retry", choices=["failed"], help="of the last submission, submit the failed points")
    options, rest = parser.parse_known_args(arguments)
    command = command_line.parse(["--multirun", *rest])
    own = [word.removeprefix("cluster.") for word in command.overrides if word.startswith("cluster.")]
    names = [word.removeprefix("cluster=") for word in command.overrides if word.startswith("cluster=")]
    words = [word for word in command.overrides if not command_line.CLUSTER.match(word)]
    if hydra := [word for word in words if command_line.HYDRA.match(word)]:
        raise ValueError(f"`{hydra[0]}`: `submit` uses no launcher or sweeper of Hydra: leave it out, or use `sweep`.")
    at_once = [f"at_once={options.at_once}"] if options.at_once is not None else []
    profile = names[-1] if names else options.cluster
    cluster = clusters.load(profile, [*own, *at_once])
    expanded = command._replace(overrides=words).points()
    if expanded.interval:
        raise ValueError(f"`{expanded.interval}` is no list of values: write them, as in `key=a,b`, or use `sweep`.")
    configs = [config for _, config in expanded.configs]
    resources = {number: clusters.tasks(cluster, config.trainer) for number, config in enumerate(configs)}
    slots = [{}] if cluster.executor == "slurm" else pool.slots(cluster.at_once or 1, configs[0])
    if cluster.executor == "slurm":
        submission.check_slurm()
    root = Path(configs[0].output_dir, configs[0].name, "submissions")
    if options.resume or options.retry:
        folder, numbers = _open(root, options.resume or "last", options.retry, [points.key(each) for each in configs])
    else:
        records = [points.describe(number, *point) for number, point in enumerate(expanded.configs)]
        folder = SweepFolder.create(
            root / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"),
            [{**record, "command": []} for record in records],
            keys=[record["key"] for record in records],
            overrides=words,
            cluster=profile,
            executor=cluster.executor,
            jobs={},
        )
        numbers = [*range(len(records))]
    _submit(command, cluster, folder, numbers, resources, slots, [words for words, _ in expanded.configs])


def _submit(
    command: command_line.Command,
    cluster: clusters.Cluster,
    folder: SweepFolder,
    numbers: list[int],
    resources: dict[int, tuple[int, int]],
    slots: list[dict[str, str]],
    overrides: list[list[str]],
) -> None:
    state = git_state()
    code = next(path for n in range(1, 1000) if not (path := folder.path / f"code{'' if n == 1 else f'_{n}'}").exists())
    copy = snapshot.create(code, command.file, state)
    for number in numbers:
        words = ["--config-dir", str(copy.experiment.absolute().parent), "--config-name", copy.experiment.stem]
        file = points.file_of(folder.path, number)
        points.update(file, state="pending", error="", log=None, command=[*words, *overrides[number]])
    name = command.file.parent.name
    with handled():
        jobs = submission.submit(folder, numbers, resources, cluster, copy.environment, name, slots)
    folder.update(jobs={**folder.record["jobs"], **jobs}, git=state)
    if cluster.executor == "debug":
        text, failed = points.table(folder.path)
        print(f"\n{text}", flush=True)
        sys.exit(1 if failed else None)
    identifiers = dict.fromkeys(job.partition("_")[0] for job in jobs.values())
    kind = "Slurm" if cluster.executor == "slurm" else "process"
    print(f"submitted {len(numbers)} of {len(overrides)} points: {kind} {', '.join(identifiers)}; {folder.path}")
    print(f"`{start_command('runs', name)}` shows their state.")


def _open(root: Path, name: str, retry: str | None, keys: list[str]) -> tuple[SweepFolder, list[int]]:
    """Returns an earlier submission, and its points that are to be submitted again.

    Raises:
        FileNotFoundError: there is no such submission.
        ValueError: its points differ, or none is left to submit.
    """
    found = sorted(file.parent for file in root.glob("*/sweep.json"))
    paths = [path for path in found if name in ("last", path.name)]
    if not paths:
        names = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(
            f"--resume {name} (RESUME={name}) is not a submission of {root}: use `last`, or {names}."
        )
    folder = SweepFolder(paths[-1])
    record: dict[str, Any] = folder.record
    if sorted(record["keys"]) != sorted(keys):
        raise ValueError(
            f"--resume {name} (RESUME={name}): the overrides, or the experiment, differ from those of {folder.path}, "
            f"which was submitted with `{' '.join(record['overrides'])}`: repeat them, or leave --resume out."
        )
    states = job_states.states_of(folder.path, job_states.slurm_states())
    wanted = [number for number, state in states.items() if state in (("failed",) if retry else ENDED)]
    if not wanted:
        counts = ", ".join(f"{[*states.values()].count(state)} {state}" for state in dict.fromkeys(states.values()))
        raise ValueError(f"{folder.path} has no point to submit again: {counts}.")
    return folder, wanted


if __name__ == "__main__":
    with OneParagraphErrors():
        main(sys.argv[1:])
