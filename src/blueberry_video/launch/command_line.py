"""What a command line asks for, and how an error is told to the one who typed it."""

import argparse
import logging
import os
import re
import shlex
import sys
import textwrap
import traceback
import warnings
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from omegaconf import DictConfig

from blueberry_video.config import compose, expand_sweep, load

PACKAGE = Path(__file__).resolve().parents[1]
TRAINER = ("pytorch", "trainer", "trainer.py")  # the end of the path of Lightning's file
TRACEBACK_VARIABLE = "BLUEBERRY_TRACEBACK"


class Command(NamedTuple):
    """One call of ``train``.

    Attributes:
        file: the config file of an experiment, or the one that a run saved.
        saved: which of the two.
        overrides: ``key=value`` words.
        multirun: whether every combination of ``key=a,b`` is to run.
    """

    file: Path
    saved: bool
    overrides: list[str]
    multirun: bool

    def config(self) -> DictConfig:
        """The config of a single run, resolved and checked; ``blueberry_video.config`` lists its errors."""
        return (load if self.saved else compose)(self.file, self.overrides)

    def for_hydra(self) -> list[str]:
        """The arguments of Hydra's own command line for a sweep, once every job of it has been checked."""
        for job in expand_sweep(self.overrides):
            compose(self.file, job)
        return ["--multirun", "--config-dir", str(self.file.parent), "--config-name", self.file.stem, *self.overrides]


def parse(arguments: list[str]) -> Command:
    """The command line of ``train``. ``--args`` holds overrides in one text, split as a shell would, without a shell.

    Raises:
        ValueError: nothing says what to train, or a quote in ``--args`` is left open.
    """
    parser = argparse.ArgumentParser(prog="python -m blueberry_video.train", allow_abbrev=False)
    parser.add_argument("--config-dir", type=Path, help="folder of the experiment")
    parser.add_argument("--config-name", default="config", help="its config file, without .yaml")
    parser.add_argument("--multirun", "-m", action="store_true", help="run every combination of key=a,b")
    parser.add_argument("--args", action="append", default=[], help="more overrides, in one text")
    parser.add_argument("overrides", nargs="*", help="key=value; first may come the config.yaml of a run, to repeat it")
    known = parser.parse_intermixed_args(arguments)
    overrides = [*known.overrides, *(word for text in known.args for word in _split(text))]
    if known.config_dir is not None:
        return Command(known.config_dir / f"{known.config_name}.yaml", False, overrides, known.multirun)
    if not overrides or not overrides[0].endswith(".yaml") or known.multirun:
        raise ValueError(
            "nothing says what to train: give an experiment with `--config-dir experiments/<name>`, which is what "
            "`make train EXP=<name>` does, or the config.yaml of a run as the first argument."
        )
    return Command(Path(overrides[0]), True, overrides[1:], False)


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(
            f"the overrides `{text}` cannot be split into words ({error}): close every quote, and put a value with "
            "spaces into quotes, such as ARGS=\"name='two words'\"."
        ) from error


class OneParagraphErrors:
    """An error that this package raises itself ends the process with its message alone, and exit code 1.

    An error from anywhere else keeps its traceback: it is a bug. BLUEBERRY_TRACEBACK=1 shows every traceback. Not a
    ``sys.excepthook``: wandb puts one of its own before it, which prints the traceback.
    """

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        message = None if error is None or os.environ.get(TRACEBACK_VARIABLE) == "1" else paragraph(error)
        if message is not None:
            text = textwrap.fill(f"Error: {message}", 118, break_long_words=False, break_on_hyphens=False)
            print(f"\n{text}", file=sys.stderr)
            raise SystemExit(1) from None


def quiet_libraries() -> None:
    """Leaves out what libraries say on every run, good or bad; errors and other warnings stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        r".*isinstance\(treespec, LeafSpec\)",  # lightning's own use of a deprecated torch function
        r".*have overridden `on_after_batch_transfer` in `LightningModule`",  # as every task does, on purpose
        r"The number of training batches .* is smaller than the logging interval",  # an epoch may be short
        r".*does not have many workers",  # sprites need none; `data.num_workers` is in every data config
    ):
        warnings.filterwarnings("ignore", message)


def paragraph(error: BaseException) -> str | None:
    """The message of an error that this package raised itself or that a config's values caused, None for any other.

    Hydra wraps what a constructor raises, and the worker of a data loader sends its traceback as text: both are seen
    through.
    """
    if type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        key = re.search(r"full_key: (\S+)", str(error))
        inner = paragraph(error.__cause__) or f"{type(error.__cause__).__name__}: {error.__cause__}"
        return f"`{key.group(1)}` cannot be built: {inner}" if key else inner
    worker = re.match(r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback", str(error))
    if worker:
        files = re.findall(r'^  File "([^"]+)"', str(error), re.MULTILINE)
        _, _, message = str(error).rstrip().rpartition(f"\n{type(error).__name__}: ")
        return message if files and Path(files[-1]).is_relative_to(PACKAGE) else None
    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE)
    if ours:
        return str(error) if isinstance(error, Exception) else None
    return _trainer_refusal(error, frames)


def _trainer_refusal(error: BaseException, frames: traceback.StackSummary) -> str | None:
    """What Lightning's Trainer says of the values it was built from: train.py calls it, so Hydra wraps nothing."""
    refuses = isinstance(error, ValueError | TypeError) or type(error).__name__ == "MisconfigurationException"
    in_constructor = any(frame.name == "__init__" and Path(frame.filename).parts[-3:] == TRAINER for frame in frames)
    if not refuses or not in_constructor:
        return None
    needs_gpu = re.search(r"gpu|cuda", str(error), re.IGNORECASE)
    hint = " `trainer=cpu` needs no GPU; `make doctor` tells what this machine has." if needs_gpu else ""
    return f"`trainer` cannot be built: {error}{hint}"
