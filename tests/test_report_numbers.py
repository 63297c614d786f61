"""Numbers and lines on the page of ``alignkit report``."""

from __future__ import annotations

import pytest

from alignkit.reporting.numbers import Measured, duration, text, wilson
from alignkit.reporting.pictures import POINTS, Dot, thinned
from alignkit.runs.better import direction


@pytest.mark.parametrize(
    ("number", "percent", "shown"),
    [
        (Measured(1.131439, 0.23365), False, "1.13 ± 0.23"),
        (Measured(-1.374, 0.2958), False, "−1.37 ± 0.30"),
        (Measured(0.7708, 0.0484), True, "77.1 ± 4.8%"),
        (Measured(0.9375), True, "93.8%"),
        (Measured(26.962), False, "27.0"),
        (Measured(52634.7), False, "52635"),
        (Measured(0.000012345, 0.000002), False, "1.23e−05 ± 2e−06"),
        (Measured(3.0, 0.0), False, "3.00 ± 0.00"),
        (Measured(0.0), False, "0"),
        (Measured(2.0, float("nan")), False, "2.00"),
        (Measured(float("nan")), False, "not a number"),
    ],
)
def test_a_number_has_the_digits_that_its_error_justifies(number: Measured, percent: bool, shown: str) -> None:
    assert text(number, percent) == shown


def test_durations() -> None:
    assert [duration(s) for s in (4.6, 368.4, 7505)] == ["5 s", "6 min 08 s", "2 h 05 min"]


def test_the_interval_of_a_win_rate_is_wilsons() -> None:
    """Values of statsmodels.stats.proportion.proportion_confint(method="wilson")."""
    assert wilson(0.5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.72247, 1.0), abs=1e-4)


def test_a_long_line_is_drawn_as_means_of_neighbors() -> None:
    line = [Dot(n, 2.0 * n) for n in range(10 * POINTS)]
    drawn = thinned(line)

    assert len(drawn) == POINTS
    assert drawn[0] == Dot(4.5, 9.0)
    assert thinned(line[:POINTS]) == line[:POINTS]


@pytest.mark.parametrize(
    ("metric", "sign"),
    [
        *(("eval_loss", -1), ("perplexity", -1), ("ece", -1)),
        *(("accuracy_distance_1", 1), ("mean_token_accuracy", 1), ("margin", 1)),
        *(("kl", 0), ("length", 0), ("length_accuracy", 0)),
    ],
)
def test_the_name_of_a_metric_says_whether_higher_is_better(metric: str, sign: int) -> None:
    assert direction(metric) == sign
