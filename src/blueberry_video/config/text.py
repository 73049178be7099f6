"""Parts of error messages: suggestions and shortened values."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Returns a sentence with the nearest option, or with all options if none is near; empty if the word is one."""
    known = sorted({str(option) for option in options})
    if word in known:
        return ""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"Did you mean `{near[0]}`?"
    return f"Choose one of: {', '.join(known)}." if known else "There are no options."


def short(value: Any) -> str:
    """Returns a value as messages show it, with at most 60 characters."""
    text = "null" if value is None else value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def first_line(error: BaseException) -> str:
    """Returns the first line of the message of an error without its full stop, or the name of its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def explain_yaml(error: yaml.YAMLError, file: Path | None = None) -> str:
    """Returns a message for text that is not valid YAML, with its line and column."""
    mark = getattr(error, "problem_mark", None)
    name = shown(file) if file else str(getattr(mark, "name", "a YAML file"))
    position = f", line {mark.line + 1}, column {mark.column + 1}," if mark else ""
    problem = getattr(error, "problem", None) or first_line(error)
    return f"{name}{position} is not valid YAML: {problem}. Check colons, quotes, brackets and indentation there."


def shown(file: Path) -> str:
    """Returns a path, relative to the working directory if it is inside it."""
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)
