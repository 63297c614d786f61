"""The metrics of runs that answered the same prompts, and their differences to the first run, prompt by prompt.

Errors and intervals are over prompts. Those of differences and wins are paired: both answers to a prompt are one
observation, so that how hard a prompt is does not add to the error. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from alignkit.evaluation.error_bars import error_bar
from alignkit.judging import Outcomes
from alignkit.reporting.numbers import wilson
from alignkit.runs.lineage import Parent

WIN, TIE, LOSS = 1.0, 0.5, 0.0


@dataclass(frozen=True)
class Answered:
    """One policy's answers to the N prompts."""

    texts: list[str]
    lengths: list[int]  # tokens
    ended: list[bool]
    kl: list[float]  # per answer: its log-probability under the policy minus that under the first policy
    prompt_ids: list[list[int]] = field(default_factory=list)
    answer_ids: list[list[int]] = field(default_factory=list)


def run_metrics(
    run: Parent, answered: Answered, scores: Sequence[float] | None, first: Sequence[float] | None
) -> dict[str, Any]:
    """The metrics of a run, a row of the table. ``first`` are the first run's scores on the same prompts.

    Each ``..._error`` is the standard error of a mean over prompts. Without scores, or of the first run itself, the
    metrics that need them are None.
    """
    pairs = list(zip(scores or [], first, strict=True)) if first else []
    row: dict[str, Any] = {"run": str(run.folder), "stage": run.stage, **mean("score", scores)}
    row |= mean("score_difference", [own - other for own, other in pairs])
    row |= win_metrics("", [WIN if own > other else LOSS if own < other else TIE for own, other in pairs])
    row |= mean("kl", answered.kl) | mean("length", answered.lengths)
    return {**row, "eos_rate": sum(answered.ended) / len(answered.ended), "prompts": len(answered.ended)}


def judged_metrics(judge: str, outcomes: Sequence[Outcomes] | None) -> dict[str, Any]:
    """A run against the first one, by a judge. Each outcome compares the first run's answer with this run's.

    Prompts without a verdict are left out of the mean; ``judge_prompts`` is the number of the others. None for the
    first run.
    """
    wins = judged_wins(outcomes or [])
    known = [win for win in wins if win is not None]
    return {"judge": judge, **win_metrics("judge_", known), "judge_prompts": None if outcomes is None else len(known)}


def judged_wins(outcomes: Sequence[Outcomes]) -> list[float | None]:
    """The share of a win over the first answer for each prompt: 1, 0, 0.5 for a tie, or None without a verdict."""
    return [outcome.wins[1][0] for outcome in outcomes]


def win_metrics(prefix: str, wins: list[float]) -> dict[str, Any]:
    """The win rate, in which a tie is half a win, its 95 % interval, and the shares of wins, ties and losses."""
    row: dict[str, Any] = mean(f"{prefix}win_rate", wins)
    row[f"{prefix}win_rate_interval"] = wilson_interval(wins)
    for name, value in (("wins", WIN), ("ties", TIE), ("losses", LOSS)):
        row[f"{prefix}{name}"] = wins.count(value) / len(wins) if wins else None
    return row


def wilson_interval(wins: Sequence[float]) -> list[float] | None:
    """Wilson's 95 % interval of the mean of N numbers from 0 to 1; None if N is 0.

    It stays within 0 and 1 and is not empty if all numbers are equal, unlike the mean plus or minus two standard
    errors. Ties make it wider than necessary: the variance of numbers between 0 and 1 is at most that of wins and
    losses with the same mean.
    """
    return list(wilson(sum(wins) / len(wins), len(wins))) if wins else None


def mean(name: str, values: Sequence[float] | None) -> dict[str, float | None]:
    """A mean as a metric, with its standard error as ``..._error``. Both are None without values."""
    if not values:
        return {name: None, f"{name}_error": None}
    return {name: sum(values) / len(values), f"{name}_error": None, **error_bar(f"{name}_error", values)}
