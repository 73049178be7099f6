import math

import pytest

from blueberry_video.config import parse_expected
from blueberry_video.experiment.expected import judge


@pytest.mark.parametrize(
    ("bounds", "value", "met"),
    [
        ({"at_least": 0.6}, 0.6, True),
        ({"at_least": 0.6}, 0.59, False),
        ({"at_most": 0.25}, 0.25, True),
        ({"at_most": 0.25}, 0.26, False),
        ({"at_least": 0.6}, math.nan, False),
        ({"at_least": 0.6}, math.inf, False),
    ],
)
def test_verdicts(bounds: dict, value: float, met: bool) -> None:
    (verdict,) = judge({"val/motion": bounds}, {"val/motion": value})
    assert verdict.met is met
    assert str(verdict).startswith("met" if met else "MISSED")


def test_both_bounds_give_two_verdicts() -> None:
    verdicts = judge({"val/loss": {"at_least": 0.1, "at_most": 0.5}}, {"val/loss": 0.7})
    assert [(verdict.bound, verdict.met) for verdict in verdicts] == [("at_least", True), ("at_most", False)]


def test_missing_metric_is_not_met_and_suggests_the_nearest() -> None:
    (verdict,) = judge({"probe/motin": {"at_least": 0.6}}, {"val/loss": 1.0, "probe/motion": 0.9})
    assert not verdict.met
    assert verdict.value is None
    assert "'probe/motion'" in verdict.note


@pytest.mark.parametrize(
    ("expected", "pattern"),
    [
        (["val/loss"], r"`expected` = \['val/loss'\] .*at_least"),
        ({"val/loss": 0.5}, r"`expected\.val/loss` = 0\.5 .*at_least"),
        ({"val/loss": {}}, r"`expected\.val/loss` = {} .*at_least"),
        ({"val/loss": {"at_leest": 0.5}}, r"`expected\.val/loss\.at_leest` = 0\.5 .*`at_least`"),
        ({"val/loss": {"at_most": "low"}}, r"`expected\.val/loss\.at_most` = low .*finite"),
        ({"val/loss": {"at_most": True}}, r"`expected\.val/loss\.at_most` = True .*finite"),
        ({"val/loss": {"at_most": math.nan}}, r"`expected\.val/loss\.at_most` = nan .*finite"),
        ({"val/loss": {"at_least": 2, "at_most": 1}}, r"`expected\.val/loss` = .*at least 2 .*at most 1\b"),
    ],
)
def test_malformed_section_raises(expected: object, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        parse_expected(expected)  # type: ignore[arg-type]


def test_missing_section_has_no_bounds() -> None:
    assert parse_expected(None) == {}
    assert judge(None, {"val/loss": 1.0}) == []
