"""``alignkit runs``."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer

from alignkit import paths
from alignkit.cli import common, completion, terminal
from alignkit.reporting import folders, numbers, results
from alignkit.reporting.folders import ReportedRun
from alignkit.reporting.results import Change
from alignkit.runs import answers


def runs(
    given: list[str] = typer.Argument(
        None,
        metavar="FOLDER",
        help="Folders of runs. Default: runs.",
        autocompletion=completion.run_folders,
    ),
    as_json: bool = common.Json,
) -> None:
    """List runs with stage, base, result, age and size, and the commands that continue unfinished ones."""
    found, not_shown = folders.find([paths.expand(folder) for folder in given or ["runs"]])
    if as_json:
        rows = [_row(run, _headline(run)) for run in found]
        common.print_json(rows)
        return
    _print(found)
    for run in found:
        if run.state == "training":
            typer.echo(f"{run.name} is training. Watch it: alignkit watch {run.folder.with_name(_plain_name(run))}")
        elif run.state == "stopped":
            typer.echo(f"{run.name} is not finished. Continue it: {run.command}")
    for each in not_shown:
        typer.echo(f"not shown: {each.name}: {each.reason}")


def _headline(run: ReportedRun) -> Change | None:
    return results.headline(run, results.changes(run, answers.read(run.folder)))


def _row(run: ReportedRun, change: Change | None) -> dict[str, Any]:
    """A run's row of the table, as data."""
    row = {"run": run.name, "folder": str(run.folder), "state": run.state, "stage": run.stage, "step": run.step}
    row |= {"base": run.record["model"]["name"], "tuner": run.record["tuner"]}
    row |= {"metric": change.metric if change else None}
    for name, measured in (("before", change and change.before), ("after", change and change.after)):
        row |= {name: measured.value if measured else None, f"{name}_error": measured.error if measured else None}
    return row | {"finished": run.record.get("finished"), "bytes": size_of(run.folder)}


def _print(found: Sequence[ReportedRun]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    for heading in ("run", "stage", "base", "tuner", "held-out result"):
        table.add_column(heading, overflow="fold")
    for heading in ("finished", "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in found:
        change = _headline(run)
        row = _row(run, change)
        base = Path(row["base"]).name if Path(row["base"]).is_absolute() else row["base"]
        when = age(row["finished"]) if run.is_finished else f"{run.state}, step {run.step}"
        cells = (run.name, run.stage, base, row["tuner"], _result(change), when, numbers.size(row["bytes"]))
        table.add_row(*map(terminal.cell, cells))
    console = Console(highlight=False)
    console.print(table) if console.is_terminal else Console(highlight=False, width=160).print(table)


def _result(change: Change | None) -> str:
    if change is None:
        return ""
    percent = numbers.is_probability(change.metric)
    shown = [numbers.text(each, percent) for each in (change.before, change.after) if each is not None]
    return f"{numbers.label(change.metric)} {' → '.join(shown)}"


def _plain_name(run: ReportedRun) -> str:
    return run.folder.name.removesuffix(folders.UNFINISHED)


def age(finished: str) -> str:
    """The age of a time of a manifest, such as ``"3 hours ago"``."""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(finished)).total_seconds()
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            return f"{numbers.count(int(seconds // length), unit)} ago"
    return "now"


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
