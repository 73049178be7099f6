"""What an experiment's ``expected:`` section claims, and whether a run keeps it."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BOUNDS = ("at_least", "at_most")


@dataclass(frozen=True)
class Verdict:
    """One expected value beside the measured one.

    Attributes:
        metric: its name, e.g. ``val/motion``.
        bound: ``at_least`` or ``at_most``.
        limit: the expected bound.
        value: what the run measured; ``None`` where it reported no such metric.
        met: whether the value keeps the bound. A missing or non-finite value does not.
        note: why it is not met where the numbers do not say it, else empty.
    """

    metric: str
    bound: str
    limit: float
    value: float | None
    met: bool
    note: str = ""

    def __str__(self) -> str:
        sign = ">=" if self.bound == "at_least" else "<="
        value = "no value" if self.value is None else f"{self.value:.4g}"
        text = f"{'met   ' if self.met else 'MISSED'}  {self.metric} = {value} (expected {sign} {self.limit:g})"
        return f"{text}: {self.note}" if self.note else text


def parse_expected(expected: Mapping[str, Any] | None) -> dict[str, dict[str, float]]:
    """Checks an ``expected:`` section and returns it as plain numbers.

    Args:
        expected: metric -> ``{at_least: x}``, ``{at_most: x}`` or both; ``None`` is an empty section.

    Raises:
        ValueError: for any other shape, naming the metric, the value and the right form.
    """
    if expected is None:
        return {}
    if not isinstance(expected, Mapping):
        raise ValueError(
            f"expected={expected!r} is not a mapping: write `expected: {{val/motion: {{at_least: 0.6}}}}`."
        )
    return {str(metric): _parse_bounds(str(metric), bounds) for metric, bounds in expected.items()}


def _parse_bounds(metric: str, bounds: Any) -> dict[str, float]:
    if not isinstance(bounds, Mapping) or not bounds:
        raise ValueError(f"expected.{metric}={bounds!r} states no bound: write `{metric}: {{at_least: x}}` or at_most.")
    for bound, limit in bounds.items():
        if bound not in BOUNDS:
            nearest = difflib.get_close_matches(str(bound), BOUNDS, n=1, cutoff=0) or BOUNDS
            raise ValueError(
                f"expected.{metric}.{bound} is no bound: it is at_least or at_most, did you mean {nearest[0]}?"
            )
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not math.isfinite(limit):
            raise ValueError(
                f"expected.{metric}.{bound}={limit!r} is not a finite number: give the value to compare with."
            )
    if "at_least" in bounds and "at_most" in bounds and bounds["at_least"] > bounds["at_most"]:
        raise ValueError(
            f"expected.{metric} asks for at least {bounds['at_least']} and at most {bounds['at_most']}, which nothing "
            "can be: swap or remove one of the bounds."
        )
    return {str(bound): float(limit) for bound, limit in bounds.items()}


def judge(expected: Mapping[str, Any] | None, metrics: Mapping[str, float]) -> list[Verdict]:
    """One verdict a bound, in the order of the section.

    Args:
        expected: the ``expected:`` section of the config.
        metrics: the run's final metrics by name.

    Raises:
        ValueError: where the section is malformed, see :func:`parse_expected`.
    """
    return [
        _judge_bound(metric, bound, limit, metrics)
        for metric, bounds in parse_expected(expected).items()
        for bound, limit in bounds.items()
    ]


def _judge_bound(metric: str, bound: str, limit: float, metrics: Mapping[str, float]) -> Verdict:
    if metric not in metrics:
        nearest = difflib.get_close_matches(metric, metrics, n=1, cutoff=0)
        hint = f", the nearest it did is {nearest[0]!r}" if nearest else " nor any other"
        return Verdict(metric, bound, limit, None, False, f"the run reported no such metric{hint}")
    value = float(metrics[metric])
    if not math.isfinite(value):
        return Verdict(metric, bound, limit, value, False, "the value is not finite")
    return Verdict(metric, bound, limit, value, value >= limit if bound == "at_least" else value <= limit)
