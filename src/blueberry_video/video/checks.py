"""Range checks shared by the options of several stages."""

from collections.abc import Iterable


def check_choice(key: str, value: object, choices: Iterable[str]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:  # type: ignore[operator]
        raise ValueError(f"{key}={value!r} does not exist: choose from {', '.join(choices)}.")


def check_at_least(least: float, **values: float | None) -> None:
    """Raises ValueError for the first value below ``least``, or NaN; None is ignored."""
    for key, value in values.items():
        if value is not None and not value >= least:
            raise ValueError(f"{key}={value} is out of range: use at least {least}.")
