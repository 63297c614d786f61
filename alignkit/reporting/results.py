"""The changes that a run made, measured on held-out rows: metrics, win rates and lengths, with their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from alignkit.reporting import numbers
from alignkit.reporting.folders import ReportedRun
from alignkit.reporting.numbers import Measured
from alignkit.runs.answers import Answers
from alignkit.runs.better import direction
from alignkit.runs.curves import Point

BEYOND = 2  # standard errors of a difference that count as a measurable change

Verdict = Literal["improved", "got worse", "rose", "fell", "no measurable change", "no error recorded", "no comparison"]


class Change(NamedTuple):
    """A held-out metric before and after training."""

    metric: str
    before: Measured | None
    after: Measured
    difference: Measured | None  # paired by prompt if ``paired``
    paired: bool
    step: int  # of the evaluation after training

    @property
    def verdict(self) -> Verdict:
        """The meaning of the change, if it is larger than :data:`BEYOND` standard errors."""
        if self.difference is None:
            return "no comparison"
        value, error = self.difference
        if error is None:
            return "no error recorded"
        if abs(value) <= BEYOND * error:
            return "no measurable change"
        better = direction(self.metric) * value
        return ("improved" if better > 0 else "got worse") if better else ("rose" if value > 0 else "fell")


def headline(run: ReportedRun, changes: Sequence[Change]) -> Change | None:
    """The change that says whether the run worked: of the first metric that its stage watches, else of the loss."""
    by_name = {each.metric: each for each in changes}
    watched = [name for name in run.watch if name in by_name and direction(name)]
    return by_name.get(watched[0] if watched else "loss")


def changes(run: ReportedRun, answers: Sequence[Answers]) -> list[Change]:
    """The held-out metrics, before training (step 0) and at the last evaluation. NaN: not finite then."""
    result = []
    measured = [curve for curve in run.curves if curve.held_out]
    evaluated = max((curve.held_out[-1].step for curve in measured), default=0)
    for curve in measured:
        first, last = curve.held_out[0], curve.held_out[-1]
        if last.step < evaluated:  # curves have finite points only
            last = Point(evaluated, math.nan)
        after = Measured(last.value, last.error)
        before = Measured(first.value, first.error) if first.step == 0 < last.step else None
        change = numbers.difference(before, after) if before and math.isfinite(after.value) else None
        paired = _paired_difference(answers, curve.name, last.step)
        # the same means: the answers are those of the metric, and all of them
        same = change and paired and math.isclose(change.value, paired.value, rel_tol=1e-2, abs_tol=1e-3)
        result.append(Change(curve.name, before, after, paired if same else change, bool(same), last.step))
    return result


def _paired_difference(answers: Sequence[Answers], column: str, step: int) -> Measured | None:
    """The mean difference of a column between step 0 and ``step``, prompt by prompt. None without both."""
    pairs = _pairs(answers, column, step)
    return numbers.mean([after - before for before, after in pairs]) if len(pairs) > 1 else None


def _pairs(answers: Sequence[Answers], column: str, step: int) -> list[tuple[float, float]]:
    """The values of a column at step 0 and at ``step`` for each prompt that has both."""
    if not answers or answers[0].step != 0 or answers[-1].step != step or step == 0:
        return []
    first, last = answers[0], answers[-1]
    if first.prompts != last.prompts:
        return []
    values = zip(first.columns.get(column, []), last.columns.get(column, []), strict=False)
    return [(before, after) for before, after in values if before is not None and after is not None]


class WinRate(NamedTuple):
    """The share of prompts whose answer after training scores higher than the one before. A tie is half."""

    wins: int
    ties: int
    losses: int

    @property
    def prompts(self) -> int:
        return self.wins + self.ties + self.losses

    @property
    def rate(self) -> float:
        return (self.wins + self.ties / 2) / self.prompts

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval."""
        return numbers.wilson(self.rate, self.prompts)


def win_rate(answers: Sequence[Answers]) -> WinRate | None:
    """The win rate of the last answers over those before training, by score. None if they are not both scored."""
    pairs = _pairs(answers, "score", answers[-1].step if answers else 0)
    if not pairs:
        return None
    wins, losses = sum(after > before for before, after in pairs), sum(after < before for before, after in pairs)
    return WinRate(wins, len(pairs) - wins - losses, losses)
