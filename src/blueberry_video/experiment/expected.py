"""Comparison of the final metrics of a run with the ``expected:`` section of its config."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blueberry_video.config import parse_expected


@dataclass(frozen=True)
class Verdict:
    """Comparison of a metric with one expected bound.

    Attributes:
        metric: its name, e.g. ``val/motion``.
        bound: ``at_least`` or ``at_most``.
        limit: the expected bound.
        value: the measured value; ``None`` if the run did not report the metric.
        met: whether the value meets the bound. A missing or non-finite value does not.
        note: the reason why it is not met if the numbers do not show it, else empty.
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


def judge(expected: Mapping[str, Any] | None, metrics: Mapping[str, float]) -> list[Verdict]:
    """Returns one verdict per bound, in the order of the section.

    Args:
        expected: the ``expected:`` section of the config.
        metrics: the final metrics of the run by name.

    Raises:
        ValueError: if the section is malformed, see :func:`blueberry_video.config.parse_expected`.
    """
    return [
        _judge_bound(metric, bound, limit, metrics)
        for metric, bounds in parse_expected(expected).items()
        for bound, limit in bounds.items()
    ]


def _judge_bound(metric: str, bound: str, limit: float, metrics: Mapping[str, float]) -> Verdict:
    if metric not in metrics:
        nearest = difflib.get_close_matches(metric, metrics, n=1, cutoff=0)
        hint = f"; the nearest reported metric is {nearest[0]!r}" if nearest else ""
        return Verdict(metric, bound, limit, None, False, f"the run did not report this metric{hint}")
    value = float(metrics[metric])
    if not math.isfinite(value):
        return Verdict(metric, bound, limit, value, False, "the value is not finite")
    return Verdict(metric, bound, limit, value, value >= limit if bound == "at_least" else value <= limit)
