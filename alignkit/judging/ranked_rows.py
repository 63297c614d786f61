"""Rows of samples with the ranks of their answers, and notes on what a judge left out. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from alignkit.judging.choosing import Chosen
from alignkit.judging.comparing import Outcomes
from alignkit.judging.judge import OpenJudge
from alignkit.judging.samples import Sample


def ranked(sample: Sample, ranks: object) -> dict[str, Any]:
    """The row of a sample with these ranks, without the margins of its former ranks."""
    return {**{name: value for name, value in sample.row.items() if name != "margins"}, "ranks": ranks}


def ranked_rows(samples: Sequence[Sample], outcomes: Sequence[Outcomes | None]) -> list[dict[str, Any]]:
    """The rows whose answers are all compared, each with its ranks."""
    pairs = zip(samples, outcomes, strict=True)
    return [ranked(sample, outcome.ranks) for sample, outcome in pairs if outcome is not None and outcome.complete]


def notes(chosen: Chosen, judge: OpenJudge, outcomes: Sequence[Outcomes | None]) -> Iterator[str]:
    """The number of requests, what was left out and why, and how to continue."""
    judged = [outcome for outcome in outcomes if outcome is not None]
    if judge.identity is not None:
        yield f"{judge.asked} requests to {chosen.name}; {judge.stored} verdicts were stored already"
    if left_out := sum(not outcome.complete for outcome in judged):
        yield f"left out {left_out} rows: {chosen.name} gave no verdict on at least one of their pairs"
    if unasked := len(outcomes) - len(judged):
        again = "Run the same command again to continue" if judge.identity is not None else "Raise it to rank them"
        yield f"{unasked} rows are not ranked: --limit {judge.limit} is used up. {again}"
