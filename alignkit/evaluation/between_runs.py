"""Compares runs with the first one on the same prompts. Importing this module imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from alignkit.evaluation import comparison, paired
from alignkit.evaluation.checkpoints import Policy
from alignkit.evaluation.comparison import Comparison
from alignkit.evaluation.judged import Judged, Progress, judge_policies

Row = dict[str, Any]


def with_scorer(of: Comparison) -> Comparison:
    """The comparison with the newest reward model as its scorer, if it has neither a scorer nor a judge.

    Raises:
        ConfigError: there is no reward model.
    """
    return of._replace(scorer=comparison.newest_reward(of.runs)) if of.scorer is None and of.judge is None else of


def describe(of: Comparison) -> str:
    """The prompts, the scorer and the judge of a comparison, on one line."""
    names = [f"scores by {of.scorer.name}"] if of.scorer else []
    if of.judge:
        most = of.judge.way.requests(["a", "b"]) * len(of.asked.prompts) * (len(of.runs) - 1)
        names.append(f"judged by {of.judge.name}, at most {most} requests")
    return f"{len(of.asked.prompts)} prompts, {of.source}; {'; '.join(names)}"


def compare(of: Comparison, say: Callable[[str], None], progress: Progress) -> tuple[list[Row], Judged | None]:
    """A row of metrics for each run, and what a judge says. Each run answers all prompts."""
    from alignkit.evaluation.answering import answer, score

    with progress("answering", len(of.runs) * len(of.asked.prompts)) as advance:
        answered = answer([Policy(run) for run in of.runs], of.asked, advance)
    scores = score(of.scorer, of.asked, answered, say) if of.scorer else None
    rows = [
        paired.run_metrics(run, answers, scores[number] if scores else None, scores[0] if scores and number else None)
        for number, (run, answers) in enumerate(zip(of.runs, answered, strict=True))
    ]
    if of.judge is None:
        return rows, None
    judged = judge_policies(of.judge, of.asked, answered, say, progress)
    about_judge = {name: judged.report[name] for name in ("consistency", "first_place", "length_correlation")}
    for row, outcomes in zip(rows, [None, *judged.outcomes], strict=True):
        row |= paired.judged_metrics(of.judge.name, outcomes)
        row |= {f"judge_{name}": value for name, value in about_judge.items()}
    return rows, judged


def settings(of: Comparison) -> dict[str, Any]:
    """The settings that the metrics depend on."""
    return {"reward": of.scorer and of.scorer.name, **of.asked.settings()}


def as_json(of: Comparison, rows: list[Row], judged: Judged | None) -> dict[str, Any]:
    """The result as ``alignkit compare --json`` prints it."""
    prompts = {"prompts": len(of.asked.prompts), "data": of.source}
    of_judge = {"judge": of.judge and of.judge.name, "judge_report": judged and judged.report}
    return {"compared_with": rows[0]["run"], **prompts, **settings(of), **of_judge, "runs": rows}
