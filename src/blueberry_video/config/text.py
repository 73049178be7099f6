"""Parts of error messages: suggestions and shortened values."""

import difflib
from collections.abc import Iterable
from typing import Any


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
