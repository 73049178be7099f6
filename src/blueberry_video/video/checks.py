"""Range checks shared by the options of several stages."""

import math
from collections.abc import Iterable


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
