"""``alignkit compare --checkpoints``: the reward-KL frontier of runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from alignkit.cli import common, tables
from alignkit.errors import ConfigError
from alignkit.evaluation import checkpoints, comparison
from alignkit.evaluation.checkpoints import Along, Measure
from alignkit.evaluation.comparison import Asked, Comparison
from alignkit.evaluation.judged import judge_policies
from alignkit.evaluation.paired import TIE, judged_wins
from alignkit.generation.scorers import Scorer
from alignkit.runs import frontier, pictures
from alignkit.runs.lineage import Parent


def along_runs(of: Comparison, along: Sequence[Along], output: Sequence[Path], trusted: bool) -> dict[str, Any]:
    """Compare the policies ``along`` each run with its start. ``trusted`` runs may name code to run.

    Prints a table for each run, writes the frontier into the run folders, and returns the result for --json.

    Raises:
        AlignkitError: nothing scores the answers, or a folder is read-only.
    """
    measures, warnings = checkpoints.measures_of(of.runs, of.scorer, of.judge, trusted)
    drawings = _drawings(of.runs, output)
    for file, _ in drawings:
        if not os.access(file.absolute().parent, os.W_OK):
            raise ConfigError(f"{file} cannot be written: the folder is read-only")
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    labels = [checkpoints.describe(measure) for measure in measures]
    typer.echo(f"{len(of.asked.prompts)} prompts, {of.source}; {'; '.join(labels)}")
    common.quiet()
    columns = {"data": of.source, **of.asked.settings()}
    results = list[dict[str, Any]]()
    for run, policies in zip(of.runs, along, strict=True):
        rows, notes = _evaluate(of.asked, policies, measures)
        comparison.write_rows(run.folder / frontier.FILE, rows, **columns)
        typer.echo(f"\n{run.folder}")
        _print(rows, labels)
        for note in notes:
            typer.echo(note)
        results.append({"run": str(run.folder), "stage": run.stage, "policies": rows, "notes": notes})
    for file in output:
        if file.suffix == ".jsonl":
            rows = [{"run": result["run"], **row} for result in results for row in result["policies"]]
            comparison.write_rows(file, rows, **columns)
    points = {result["run"]: list(map(checkpoints.point_of, result["policies"])) for result in results}
    for file, runs in drawings:
        frontier.draw(file, {str(run.folder): points[str(run.folder)] for run in runs}, *labels)
    written = [run.folder / frontier.FILE for run in of.runs] + [file for file, _ in drawings]
    typer.echo(f"\nwritten: {', '.join(map(str, written))}")
    if not drawings:
        typer.echo("pictures need matplotlib, which is not installed: pip install 'alignkit[plot]'")
    return {"measures": labels, "prompts": len(of.asked.prompts), **columns, "runs": results}


def _drawings(runs: Sequence[Parent], output: Sequence[Path]) -> list[tuple[Path, Sequence[Parent]]]:
    """The pictures to draw, each with its runs: one in each run folder, and one of all runs."""
    if not pictures.can_draw():
        return []
    of_all = [file for file in output if file.suffix != ".jsonl"]
    if not of_all and len(runs) > 1:
        folder = Path(os.path.relpath(os.path.commonpath([run.folder.absolute() for run in runs])))
        of_all = [folder / name for name in frontier.PICTURES]
    of_each = [(run.folder / name, [run]) for run in runs for name in frontier.PICTURES]
    return [*of_each, *((file, runs) for file in of_all)]


def _evaluate(asked: Asked, policies: Along, measures: Sequence[Measure]) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of a run's ``frontier.jsonl``, and notes on them."""
    from alignkit.evaluation.answering import answer, score

    with common.progress("answering", len(policies) * len(asked.prompts)) as advance:
        answered = answer([policy for _, policy in policies], asked, advance)
    values, notes = list[list[list[float | None]]](), list[str]()
    for measure in measures:
        if isinstance(measure, Scorer):
            values.append([list(scores) for scores in score(measure, asked, answered, typer.echo)])
        else:
            judged = judge_policies(measure, asked, answered, typer.echo, common.progress)
            values.append([[TIE] * len(asked.prompts), *map(judged_wins, judged.outcomes)])
            notes += judged.lines
    rows = checkpoints.frontier_rows(policies, answered, measures, values)
    if len(measures) > 1 and (note := checkpoints.overoptimization(policies, values[1], measures[1])):
        notes.append(note)
    return rows, notes


def _print(rows: Sequence[dict[str, Any]], labels: Sequence[str]) -> None:
    names = ("score", "gold")[: len(labels)]
    headings = ["policy", "step", *labels, "KL to the start", "sqrt(KL)", "length", "ended"]
    tables.show(
        headings,
        [
            [
                row["policy"],
                str(row["step"]),
                *(tables.with_error(row, name, "{:.2f}") for name in names),
                tables.with_error(row, "kl", "{:.2f}"),
                f"{max(row['kl'], 0) ** 0.5:.2f}",
                f"{row['length']:.0f}",
                f"{row['eos_rate']:.0%}",
            ]
            for row in rows
        ],
    )
