"""Plans as text, for the command line and for notebooks."""

from __future__ import annotations

from collections.abc import Iterator

from alignkit.runs.plan import Pipeline, Plan

SKIPPED = 3  # reasons for skipped rows that are shown


def of_pipeline(pipeline: Pipeline) -> Iterator[str]:
    """The finished runs that are used, a line each, and the plan of every run to train."""
    for run in pipeline.finished:
        yield f"{'finished':>11}  {run.describe()}"
    for number, plan in enumerate(pipeline.to_train):
        if number or pipeline.finished:
            yield ""
        yield from of_plan(plan)


def of_plan(plan: Plan) -> Iterator[str]:
    """The plan of one run."""
    for label, text in plan.describe():
        yield f"{label:>11}  {text}"
    for reason in [*plan.source.skipped, *(plan.eval_source.skipped if plan.eval_source else [])][:SKIPPED]:
        yield f"{'skipped':>11}  {reason}"
