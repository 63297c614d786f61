"""The report on a judge: consistency, preference for the first place, for length, and agreement with people."""

from __future__ import annotations

import random
import statistics

import pytest

from alignkit.evaluation.judge_report import describe_report, judge_report
from alignkit.judging import Item, Outcomes
from alignkit.judging.comparing import Compared


def outcome_of(*pairs: tuple[int, int, tuple[int, ...]], answers: int = 2) -> Outcomes:
    wins: list[list[float | None]] = [[0.5] * answers for _ in range(answers)]
    compared = [Compared(first, second, tuple(map(float, margins))) for first, second, margins in pairs]
    for pair in compared:
        wins[pair.first][pair.second], wins[pair.second][pair.first] = pair.win, 1 - pair.win
    return Outcomes(wins, compared)


def test_the_report_by_hand() -> None:
    prompts = [[{"role": "user", "content": f"p{number}"}] for number in range(3)]
    items = [Item(prompts[0], ["aaa", "b"]), Item(prompts[1], ["aaa", "b"]), Item(prompts[2], ["a", "bbb"])]  # type: ignore[arg-type]
    outcomes = [
        outcome_of((0, 1, (1, 1))),  # the longer answer wins in both orders
        outcome_of((0, 1, (1, -1))),  # the first place wins in both orders: a tie
        outcome_of((0, 1, (1, 0))),  # a tie in one order: a tie
    ]
    report = judge_report(items, outcomes, [[0, 1], [0, 1], None])

    assert report["consistency"] == pytest.approx(1 / 3)
    # the standard deviation of (1, 0, 0) is 1/sqrt(3), over sqrt(3)
    assert report["consistency_error"] == pytest.approx(1 / 3)
    assert report["first_place"] == 4 / 5  # of 5 verdicts that are not ties, one prefers the second place
    assert report["length_correlation"] == pytest.approx(1 / (1 * 3) ** 0.5)  # tau-b: wins differ in one pair of three
    # both orders of two pairs: (1, 1), (0, 1) and their negatives; 2 of 4 agree, and by chance (1*2 + 1*2) / 16
    assert report["kappa"] == pytest.approx((2 / 4 - 4 / 16) / (1 - 4 / 16))
    assert describe_report(report)[-1].startswith("warning: this judge is not reliable")
    assert describe_report(judge_report([], [])) == []


def test_the_error_of_a_correlation_is_that_of_repeated_samples() -> None:
    """The jackknife's error agrees with the spread of the same statistic over many samples of 40 prompts."""
    generator = random.Random(0)
    values, errors = [], []
    for _ in range(200):
        items, outcomes = [], []
        for number in range(40):
            sign = 1 if generator.random() < 0.7 else -1
            items.append(Item([{"role": "user", "content": str(number)}], ["aa", "b"]))
            outcomes.append(outcome_of((0, 1, (sign, sign))))
        report = judge_report(items, outcomes)
        values.append(report["length_correlation"])
        errors.append(report["length_correlation_error"])

    assert statistics.fmean(errors) == pytest.approx(statistics.stdev(values), rel=0.1)
