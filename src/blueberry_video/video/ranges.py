"""Range checks shared by the options of several stages."""

import math
from collections.abc import Iterable, Sequence


def check_choice(key: str, value: str, choices: Iterable[str]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{key}={value!r} does not exist: choose from {', '.join(choices)}.")


def check_at_least(least: float, **values: float | None) -> None:
    """Raises ValueError for the first value below ``least``, or NaN; None is ignored."""
    for key, value in values.items():
        if value is not None and not value >= least:
            raise ValueError(f"{key}={value} is out of range: use at least {least}.")


def check_above_zero(finite: bool = False, /, **values: float | None) -> None:
    """Raises ValueError for the first value that is not above 0, or not finite if ``finite``; None is ignored."""
    fix = "a finite number above 0" if finite else "a number above 0, or null for no limit"
    for key, value in values.items():
        if value is not None and (not value > 0 or (finite and value == math.inf)):
            raise ValueError(f"{key}={value} is out of range: use {fix}.")


def check_between(low: float, high: float, **values: float) -> None:
    """Raises ValueError for the first value outside ``low`` to ``high``, or NaN."""
    for key, value in values.items():
        if not low <= value <= high:
            raise ValueError(f"{key}={value} is out of range: use {low} to {high}.")


def check_indices(indices: Sequence[int], num_frames: int, name: str) -> list[int]:
    """Returns frame indices as a list; raises IndexError if it is empty or has an index outside 0 … num_frames - 1."""
    found = [int(i) for i in indices]
    if not found or min(found) < 0 or max(found) >= num_frames:
        shown = f"Frame indices {found[:8]} are invalid for {name}, which has frames 0 to {num_frames - 1}"
        raise IndexError(f"{shown}: use at least one index in this range.")
    return found
