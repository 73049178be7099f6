"""Command line of ``train``."""

import argparse
import logging
import re
import warnings
from pathlib import Path
from typing import NamedTuple

from hydra.core.override_parser.types import IntervalSweep
from omegaconf import DictConfig

from blueberry_video.config import compose, expand_sweep, load, normalize, sweep_settings
from blueberry_video.config.compose import parse as parse_overrides
from blueberry_video.installation import start_command
from blueberry_video.launch import processes
from blueberry_video.launch.words import split

DTYPES = ("float32", "bfloat16", "float16")  # of exported weights and stored latents
CLUSTER = re.compile(r"[+~]*cluster[.=]")  # words of `submit`
HYDRA = re.compile(r"[+~]*hydra[./]")  # overrides of Hydra's own settings


class Points(NamedTuple):
    """Points of a sweep.

    Attributes:
        configs: overrides, without those of Hydra, and resolved config of each point.
        folder: folder of the sweep.
        sweeper: name of Hydra's sweeper: ``basic`` runs these points, others choose points during the sweep.
        interval: first override with an interval, from which a sweeper chooses; empty if there is none.
    """

    configs: list[tuple[list[str], DictConfig]]
    folder: Path
    sweeper: str
    interval: str = ""


class Command(NamedTuple):
    """Parsed command line of ``train``.

    Attributes:
        file: the config file of an experiment, or the one saved by a run.
        saved: whether the file was saved by a run.
        overrides: ``key=value`` words.
        multirun: whether to run every combination of ``key=a,b``.
        retry: ``failed`` to train the failed points of the last sweep again.
        jobs: number of points at once, as processes of this machine; 1: Hydra's launcher runs them.
        fail_fast: whether a failed point ends the sweep.
        new: start a new sweep, also if an earlier one with the same points was interrupted.
    """

    file: Path
    saved: bool
    overrides: list[str]
    multirun: bool
    retry: str | None = None
    jobs: int = 1
    fail_fast: bool = False
    new: bool = False

    def config(self) -> DictConfig:
        """Returns the resolved and checked config of a single run; raises the errors of ``blueberry_video.config``."""
        self._check_cluster()
        if not self.saved:
            return compose(self.file, self.overrides)
        is_rank = processes.shared_folder() is not None  # the process that started it has checked the config
        return load(self.file, self.overrides, trusted=is_rank)

    def points(self) -> Points:
        """Checks the config of every point of a sweep.

        Raises:
            ValueError: a point is invalid, or the overrides contain ``resume``.
        """
        self._check_cluster()
        if resumes := [word for word in self.overrides if word.lstrip("+~").startswith("resume=")]:
            raise ValueError(
                f"`{resumes[0]}`: the same command continues a sweep that was interrupted. Continue one run by its "
                f"name, in a single run: `{start_command('train', '…', RESUME='<run>')}`."
            )
        jobs = expand_sweep(self.overrides, self.file)
        single = [[word for word in job if not HYDRA.match(word)] for job in jobs]
        configs = [compose(self.file, words) for words in single]
        folder, sweeper = sweep_settings(self.file, jobs[0])
        intervals = [
            word.input_line for word in parse_overrides(self.overrides) if isinstance(word.value(), IntervalSweep)
        ]
        return Points([*zip(single, configs, strict=True)], Path(folder), sweeper, str((*intervals, "")[0]))

    def _check_cluster(self) -> None:
        if found := [word for word in self.overrides if CLUSTER.match(word)]:
            raise ValueError(
                f"`{found[0]}`: a cluster profile is of `submit`, which alone reads it: "
                f"`{start_command('submit', self.file.parent.name, CLUSTER='<name>')}`."
            )

    def of_experiment(self) -> list[str]:
        """Returns the arguments that select the experiment."""
        return ["--config-dir", str(self.file.parent), "--config-name", self.file.stem]

    def hydra_words(self, folder: Path) -> list[str]:
        """Returns the arguments for Hydra's command line; ``folder`` is that of the sweep."""
        return ["--multirun", *self.of_experiment(), *self.overrides, f"hydra.sweep.dir='{folder}'"]

    def again(self, **variables: str) -> str:
        """Returns the command line of this sweep, with further variables of make."""
        return start_command("sweep", self.file.parent.name, SWEEP=" ".join(self.overrides), **variables)


DEFAULTS = Command._field_defaults


def parse(arguments: list[str]) -> Command:
    """Parses the command line of ``train``. ``--args`` takes several overrides in one string, with shell quoting.

    Raises:
        ValueError: if there is neither an experiment nor a config file, or ``--args`` has an open quote.
    """
    parser = argparse.ArgumentParser(prog="blueberry train", allow_abbrev=False)
    parser.add_argument("--config-dir", type=Path, help="folder of the experiment")
    parser.add_argument("--config-name", default="config", help="its config file, without .yaml")
    parser.add_argument("--multirun", "-m", action="store_true", help="run every combination of key=a,b")
    parser.add_argument("--retry", choices=["failed"], help="of a sweep: train the failed points again")
    parser.add_argument("--jobs", type=int, default=1, help="of a sweep: points at once, as processes")
    parser.add_argument("--fail-fast", nargs="?", const="true", default="false", choices=["true", "false"])
    parser.add_argument("--new", action="store_true", help="of a sweep: do not continue an interrupted one")
    parser.add_argument("--args", action="append", default=[], help="more overrides, in one string")
    parser.add_argument("overrides", nargs="*", help="key=value; the config.yaml of a run as the first word repeats it")
    known = parser.parse_intermixed_args(arguments)
    overrides = normalize([*known.overrides, *(word for text in known.args for word in split(text))])
    options = {"retry": known.retry, "jobs": known.jobs, "fail_fast": known.fail_fast == "true", "new": known.new}
    if not known.multirun and (
        given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value != DEFAULTS[name]]
    ):
        raise ValueError(f"{given[0]} is an option of sweeps: `{start_command('sweep', '<name>', SWEEP='seed=1,2')}`.")
    if known.jobs < 1:
        raise ValueError(
            f"--jobs {known.jobs} (JOBS={known.jobs}) must be at least 1: it is the number of points at once."
        )
    if known.config_dir is not None:
        file = known.config_dir / f"{known.config_name}.yaml"
        return Command(file, False, overrides, known.multirun, **options)
    if not overrides or not overrides[0].endswith(".yaml") or known.multirun:
        raise ValueError(
            f"the arguments {arguments} contain no experiment: use `--config-dir experiments/<name>`, as "
            f"`{start_command('train', '<name>')}` does, or, for a single run, the config.yaml of a run as the first "
            "argument."
        )
    return Command(Path(overrides[0]), True, overrides[1:], False)


def quiet_libraries() -> None:
    """Suppresses messages that libraries print in every run; errors and other warnings are kept."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        r".*isinstance\(treespec, LeafSpec\)",  # Lightning uses a deprecated torch function
        r".*have overridden `on_after_batch_transfer` in `LightningModule`",  # every task does, on purpose
        r"The number of training batches .* is smaller than the logging interval",  # an epoch may be short
        r"The `srun` command is available on your system but is not used",  # one process, or ranks of this package
        r".*does not have many workers",  # sprites need none; `data.num_workers` is in every data config
    ):
        warnings.filterwarnings("ignore", message)
