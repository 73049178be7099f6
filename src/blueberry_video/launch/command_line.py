"""Command line of ``train``."""

import argparse
import logging
import re
import warnings
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig

from blueberry_video.config import compose, expand_sweep, load, normalize, sweep_folder
from blueberry_video.installation import start_command
from blueberry_video.launch import processes
from blueberry_video.launch.words import split

DTYPES = ("float32", "bfloat16", "float16")  # of exported weights and stored latents
HYDRA = re.compile(r"[+~]*hydra[./]")  # overrides of Hydra's own settings


class Command(NamedTuple):
    """Parsed command line of ``train``.

    Attributes:
        file: the config file of an experiment, or the one saved by a run.
        saved: whether the file was saved by a run.
        overrides: ``key=value`` words.
        multirun: whether to run every combination of ``key=a,b``.
    """

    file: Path
    saved: bool
    overrides: list[str]
    multirun: bool

    def config(self) -> DictConfig:
        """Returns the resolved and checked config of a single run; raises the errors of ``blueberry_video.config``."""
        if not self.saved:
            return compose(self.file, self.overrides)
        is_rank = processes.shared_folder() is not None  # the process that started it has checked the config
        return load(self.file, self.overrides, trusted=is_rank)

    def for_hydra(self) -> tuple[Path, list[str]]:
        """Checks the config of every job of a sweep.

        Returns:
            The folder of the sweep and the arguments for Hydra's command line.

        Raises:
            ValueError: a job is invalid, or the overrides contain ``resume``.
        """
        if resumes := [word for word in self.overrides if word.lstrip("+~").startswith("resume=")]:
            raise ValueError(
                f"`{resumes[0]}`: a sweep starts new runs. Continue each run by its name, in a single run: "
                f"`{start_command('train', '…', RESUME='<run>')}`."
            )
        jobs = expand_sweep(self.overrides, self.file)
        for job in jobs:
            compose(self.file, [word for word in job if not HYDRA.match(word)])
        folder = sweep_folder(self.file, jobs[0])
        words = [*self.overrides, f"hydra.sweep.dir='{folder}'"]
        return Path(folder), [
            "--multirun",
            "--config-dir",
            str(self.file.parent),
            "--config-name",
            self.file.stem,
            *words,
        ]


def parse(arguments: list[str]) -> Command:
    """Parses the command line of ``train``. ``--args`` takes several overrides in one string, with shell quoting.

    Raises:
        ValueError: if there is neither an experiment nor a config file, or ``--args`` has an open quote.
    """
    parser = argparse.ArgumentParser(prog="blueberry train", allow_abbrev=False)
    parser.add_argument("--config-dir", type=Path, help="folder of the experiment")
    parser.add_argument("--config-name", default="config", help="its config file, without .yaml")
    parser.add_argument("--multirun", "-m", action="store_true", help="run every combination of key=a,b")
    parser.add_argument("--args", action="append", default=[], help="more overrides, in one string")
    parser.add_argument("overrides", nargs="*", help="key=value; the config.yaml of a run as the first word repeats it")
    known = parser.parse_intermixed_args(arguments)
    overrides = normalize([*known.overrides, *(word for text in known.args for word in split(text))])
    if known.config_dir is not None:
        return Command(known.config_dir / f"{known.config_name}.yaml", False, overrides, known.multirun)
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
