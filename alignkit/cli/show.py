"""``alignkit show``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import typer

from alignkit import paths
from alignkit.cli import common, completion, terminal
from alignkit.cli.runs import age, size_of
from alignkit.errors import ConfigError
from alignkit.reporting import folders, numbers, results
from alignkit.reporting.folders import ReportedRun
from alignkit.reporting.results import Change
from alignkit.runs import answers


def show(
    run: str = typer.Argument(
        metavar="RUN",
        help="A run folder, finished or not.",
        autocompletion=completion.run_folders,
    ),
    as_json: bool = common.Json,
) -> None:
    """Show a run: its parents and data, its held-out results, and the command that reproduces it."""
    found, not_shown = folders.find([paths.expand(run)])
    if len({each.folder.name.removesuffix(folders.UNFINISHED) for each in found}) > 1:
        raise ConfigError(f"show: {run} contains several runs. Name one of them; `alignkit runs {run}` lists them")
    if not found:
        raise ConfigError(f"show: {run} cannot be shown: {not_shown[0].reason}")
    for each in found:
        if as_json:
            common.print_json(each.record)
            continue
        for name, value in _facts(each):
            typer.echo(f"{name:>10}  {value}")
        if changes := results.changes(each, answers.read(each.folder)):
            _print(changes)


def _facts(run: ReportedRun) -> Iterator[tuple[str, str]]:
    record = run.record
    when = f"finished {age(record['finished'])}" if run.is_finished else f"{run.state} at step {run.step}"
    yield "run folder", f"{run.folder} ({when}, {numbers.size(size_of(run.folder))})"
    yield "stage", f"{run.stage}: {run.declared.summary}" if run.declared else run.stage
    yield "model", record["model"]["name"]
    for role, parent in record["parents"].items():
        yield f"{role} from", parent["folder"]
    yield "tuner", record["tuner"]
    yield "plugins", ", ".join(run.config["plugins"])
    if run.is_finished:
        data = record["data"]
        yield "data", f"{numbers.count(data['train_rows'], 'row')} from {data['source']} (format {data['format']})"
        yield "held out", numbers.count(data["eval_rows"], "row")
        took = f"{numbers.count(run.step, 'step')} in {numbers.duration(record['seconds'])}"
        several = f", {record['processes']} processes" if record["processes"] > 1 else ""
        yield "training", f"{took}, {record['dtype']}{several}"
        yield "versions", ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    yield ("again" if run.is_finished else "continue"), run.command


def _print(changes: Sequence[Change]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("held-out metric")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for change in changes:
        percent = numbers.is_probability(change.metric)
        before = numbers.text(change.before, percent) if change.before else ""
        moved = numbers.text(change.difference, percent, sign=True) if change.difference else ""
        cells = (numbers.label(change.metric), before, numbers.text(change.after, percent), moved, change.verdict)
        table.add_row(*map(terminal.cell, cells))
    console = Console(highlight=False)
    console.print(table) if console.is_terminal else Console(highlight=False, width=120).print(table)
