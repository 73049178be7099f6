"""Console command ``blueberry``: starts the entry points of the package, with names of experiments as arguments.

    blueberry train my_idea trainer.max_steps=1
    blueberry sweep my_idea seed=1,2
    blueberry train my_idea --resume last

A name stands for ``experiments/<name>`` below the working directory, and for commands that read runs for
``outputs/<name>``; a path is used unchanged. ``--args="…"`` adds words with shell quoting.
"""

import os
import sys
from pathlib import Path

from blueberry_video import __version__
from blueberry_video.launch.commands import COMMANDS, help_text
from blueberry_video.launch.errors import OneParagraphErrors
from blueberry_video.launch.words import split


def main() -> None:
    """Replaces this process by ``python -m <module> …`` for the command line."""
    with OneParagraphErrors():
        words = translate(sys.argv[1:])
    if words is not None:
        os.execv(sys.executable, [sys.executable, "-m", *words])


def translate(arguments: list[str]) -> list[str] | None:
    """Returns the module and its arguments; None after printing help or the version.

    Raises:
        ValueError: unknown command, or the experiment or run is missing.
    """
    name, rest = (arguments[0] if arguments else "--help"), arguments[1:]
    if name in ("-h", "--help", "--version"):
        print(f"blueberry-video {__version__}" if name == "--version" else help_text())
        return None
    name = name.replace("_", "-")
    if name not in COMMANDS:
        import difflib  # slow to import

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean `blueberry {near[0]}`?" if near else f"Use one of: {', '.join(COMMANDS)}."
        raise ValueError(f"`blueberry {arguments[0]}`: there is no command {arguments[0]!r}. {hint}")
    command = COMMANDS[name]
    if {"-h", "--help"} & {*rest} and (command.first == "experiment" or not command.has_help):
        print(f"usage: blueberry {name} {command.usage}\n\n{command.summary}")
        return None
    module = f"blueberry_video.{command.module}"
    if not command.first:
        return [module, *_expanded(rest)]
    reads_runs = command.first in ("run", "weights")
    if reads_runs and {"-h", "--help"} & {*rest}:
        return [module, "--help"]
    if not rest or rest[0].startswith("-") or ("=" in rest[0] and "/" not in rest[0]):
        given = f" instead of `{rest[0]}`" if rest else ""
        raise ValueError(
            f"`blueberry {name}` requires the name of an experiment as its first argument{given}: "
            f"`blueberry {name} {command.usage}`. {_experiments()}"
        )
    if reads_runs:
        is_path = "/" in rest[0] or (command.first == "weights" and Path(rest[0]).exists())
        return [module, rest[0] if is_path else f"outputs/{rest[0]}", *_expanded(rest[1:])]
    teachers, words = _options(rest[1:], {"--checkpoint": ""} if name == "pseudo-labels" else {})
    resumes, words = _options(words, {"--resume": "resume="} if command.module == "train" else {})
    if name == "pseudo-labels" and not teachers:
        raise ValueError(f"--checkpoint is missing: `blueberry {name} {rest[0]} --checkpoint outputs/<experiment>`.")
    return [module, *teachers, *_experiment(rest[0]), *words, *resumes, *command.added]


def _experiment(name: str) -> list[str]:
    """Returns the arguments that select an experiment by name or folder, or the config of a run."""
    if name.endswith(".yaml"):
        return [name]
    if "/" not in name:
        return ["--config-dir", f"experiments/{name}"]
    return [f"{name}/config.yaml"] if Path(name, "run.json").is_file() else ["--config-dir", name]


def _options(words: list[str], prefixes: dict[str, str]) -> tuple[list[str], list[str]]:
    """Separates ``--option value`` and ``--option=value``, as prefix and value, from the other words."""
    own: list[str] = []
    others: list[str] = []
    remaining = iter(words)
    for word in remaining:
        option, equals, value = word.partition("=")
        if option in prefixes:
            own.append(f"{prefixes[option]}{value if equals else next(remaining, '')}")
        else:
            others.append(word)
    return own, others


def _expanded(words: list[str]) -> list[str]:
    """Replaces ``--args=…`` by its words, last or before ``--``; adds ./ to names of files that look like options."""
    texts, others = _options(words, {"--args": ""})
    others = [f"./{word}" if word.startswith("-") and Path(word).is_file() else word for word in others]
    end = others.index("--") if "--" in others else len(others)  # after it, argparse reads no options
    return [*others[:end], *(word for text in texts for word in split(text)), *others[end:]]


def _experiments() -> str:
    found = sorted(file.parent.name for file in Path("experiments").glob("*/config.yaml"))
    return f"Experiments here: {', '.join(found)}." if found else "`blueberry new my_idea` creates one."


if __name__ == "__main__":
    main()
