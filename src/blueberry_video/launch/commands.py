"""Table of the commands of ``blueberry``."""

from typing import NamedTuple


class Command(NamedTuple):
    """Command of ``blueberry``.

    Attributes:
        module: module that is executed.
        first: kind of the first argument: ``experiment``, ``run``, ``weights`` (a run, or the path or hub id of
            weights), or empty if the module receives all arguments.
        usage: arguments, for the help.
        summary: description, for the help.
        added: words that the module receives in addition.
        has_help: whether the module prints its own help.
    """

    module: str
    first: str
    usage: str
    summary: str
    added: tuple[str, ...] = ()
    has_help: bool = True


RESUME = "[--resume last|RUN]"
COMMANDS = {
    "new": Command("launch.new", "", "NAME", "copy the template to experiments/NAME/", has_help=False),
    "check": Command("train", "experiment", f"EXPERIMENT [key=value …] {RESUME}", "dry run", ("check=true",)),
    "train": Command("train", "experiment", f"EXPERIMENT [key=value …] {RESUME}", "train and print a summary"),
    "sweep": Command(
        "train",
        "experiment",
        "EXPERIMENT key=a,b … [--jobs N] [--retry failed] [--fail-fast] [--new]",
        "run every combination; again after a kill: what is missing",
        ("--multirun",),
    ),
    "submit": Command(
        "submit",
        "experiment",
        "EXPERIMENT [key=value …] [key=a,b …] [--cluster NAME] [--at-once N] [--resume last] [--retry failed]",
        "submit a run or a sweep to Slurm or to the background",
    ),
    "runs": Command("runs", "", "[EXPERIMENT]", "show the state of submitted and local runs"),
    "gate": Command(
        "train",
        "experiment",
        "EXPERIMENT [key=value …]",
        "train; fail if an expected value is missed",
        ("enforce_expected=true",),
    ),
    "estimate": Command(
        "estimate",
        "experiment",
        "EXPERIMENT [--gpus N] [--device H100] [--mfu 0.4] [key=value …]",
        "memory, FLOPs and days before a run",
    ),
    "torture": Command(
        "launch.torture",
        "experiment",
        "EXPERIMENT [--kills N] [--out FOLDER] [key=value …]",
        "kill and resume a run at random moments, and compare",
    ),
    "report": Command("experiment.report", "run", "EXPERIMENT|RUN", "write report.html again"),
    "consolidate": Command(
        "experiment.consolidate", "run", "EXPERIMENT|RUN", "write the weights of a sharded checkpoint to one file"
    ),
    "export": Command("export", "run", "EXPERIMENT|RUN --out FOLDER …", "export a model for other libraries"),
    "card": Command("push", "run", "EXPERIMENT|RUN --card README.md", "write the model card of a run"),
    "push": Command("push", "run", "EXPERIMENT|RUN --repo ORG/NAME …", "upload a run with its card to a hub"),
    "predict": Command("predict", "run", "EXPERIMENT|RUN VIDEO … --out LABELS.csv …", "labels of videos"),
    "features": Command(
        "features", "weights", "EXPERIMENT|RUN|WEIGHTS VIDEO … --out FOLDER …", "features of videos by any encoder"
    ),
    "evaluate": Command(
        "evaluate", "run", "EXPERIMENT|RUN [--split NAME] [data.val.root=…] …", "metrics on another data set or split"
    ),
    "generate": Command("generate", "run", "EXPERIMENT|RUN --out CLIP.mp4|FOLDER …", "generate videos"),
    "reconstruct": Command("reconstruct", "run", "EXPERIMENT|RUN VIDEO … --out FOLDER", "reconstructions of videos"),
    "plan": Command(
        "plan", "run", "EXPERIMENT|RUN START GOAL --state NUMBERS …", "actions from an image to a goal image"
    ),
    "render": Command("render", "run", "EXPERIMENT|RUN --out FOLDER …", "render a trained scene"),
    "latents": Command(
        "precompute",
        "experiment",
        "EXPERIMENT [--out FOLDER] [--dtype bfloat16] [key=value …]",
        "encode clips and captions once, for training",
    ),
    "pseudo-labels": Command(
        "pseudo_labels",
        "experiment",
        "EXPERIMENT --checkpoint RUN [--out FOLDER] [key=value …]",
        "write the disparity that a trained model predicts",
    ),
    "data": Command("data.write", "", "source=sprites|world out=FOLDER train=1000 …", "write a folder of mp4 files"),
    "data-check": Command(
        "data_check", "", "FOLDER|TARS|EXPERIMENT [--out FOLDER] …", "classes, sizes and faults of a data set"
    ),
    "shards": Command("data.shards", "", "FOLDER --out FOLDER|s3://… …", "write tar shards of a folder of videos"),
    "process": Command("video.command", "", "VIDEO [--model NAME] [--out FOLDER] …", "input of a model from a video"),
    "depth": Command("depth", "", "VIDEO --out FOLDER --weights RUN|WEIGHTS …", "depth of a video of any length"),
    "doctor": Command("launch.doctor", "", "", "check versions, devices and tools", has_help=False),
}


def help_text() -> str:
    """Returns the help of ``blueberry``."""
    rows = "\n".join(f"  {name:14} {command.summary}" for name, command in COMMANDS.items())
    return f"""usage: blueberry COMMAND [arguments]

{rows}

`blueberry COMMAND --help` lists the arguments of a command. EXPERIMENT is the name of a folder in experiments/ below
the working directory; runs are written to outputs/. Overrides are key=value: `blueberry train my_idea seed=1`."""
