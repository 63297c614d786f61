"""A judge's verdicts on the answers of several policies, each compared with those of the first one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from alignkit.evaluation.comparison import Asked
from alignkit.evaluation.judge_report import describe_report, judge_report
from alignkit.evaluation.paired import Answered
from alignkit.judging import Item, OpenJudge, Outcomes, judge_answers
from alignkit.judging.choosing import Chosen

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


class Judged(NamedTuple):
    """The verdicts of a judge, and what they say about the judge."""

    outcomes: list[list[Outcomes]]  # for each policy after the first: its answers and the first one's, prompt by prompt
    report: dict[str, Any]
    lines: list[str]  # the report as text


def judge_policies(
    chosen: Chosen,
    asked: Asked,
    answered: Sequence[Answered],
    say: Callable[[str], None],
    progress: Progress,
) -> Judged:
    """Ask a judge to compare each policy's answers with those of the first one."""
    first, *others = answered
    fields = asked.fields or [{}] * len(asked.prompts)
    items = [
        Item(prompt, [a, b], of_row)
        for own in others
        for prompt, a, b, of_row in zip(asked.prompts, first.texts, own.texts, fields, strict=True)
    ]
    judge = OpenJudge(chosen, None, asked.batch, say)
    with progress("judging", sum(judge.way.requests(item.answers) for item in items)) as advance:
        outcomes = [outcome for outcome in judge_answers(judge, items, advance) if outcome is not None]  # no limit: all
    report = judge_report(items, outcomes)
    without = sum(not outcome.complete for outcome in outcomes)
    left_out = [f"left out {without} of {len(items)} pairs: {chosen.name} gave no verdict on them"] if without else []
    size = len(asked.prompts)
    of_policies = [outcomes[start : start + size] for start in range(0, len(outcomes), size)]
    return Judged(of_policies, report, [*left_out, *describe_report(report)])
