"""``alignkit evaluate``."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import typer

from alignkit.cli import common
from alignkit.errors import ConfigError
from alignkit.evaluation import comparison, perplexity


def evaluate(
    runs: list[str] = typer.Argument(
        metavar="RUN", help="Run folders, compared with the first one. A single run is compared with its parent."
    ),
    data: list[str] = typer.Option(
        [],
        "--data",
        "-d",
        metavar="DATA",
        help="Texts or demonstrations: a file, a folder or a hub id. Repeatable. Default: held-out demonstrations.",
    ),
    output: Path = typer.Option(None, "--output", "-o", metavar="FILE", help="Write the table to a .jsonl file."),
    limit: int = typer.Option(200, min=1, help="Maximum number of rows of each source."),
    batch: int = typer.Option(8, min=1, help="Rows per batch."),
) -> None:
    """Measure the perplexity of policies on texts and demonstrations, and how training changed it."""
    if output and (output.suffix != ".jsonl" or not output.absolute().parent.is_dir()):
        raise ConfigError(f"--output {output}: the file must end in .jsonl, in a folder that exists")
    compared = perplexity.runs_of(runs)
    sources = perplexity.sources_of(data, compared, limit)
    for source in sources:
        if count := perplexity.trained_on(source, compared):
            typer.echo(f"warning: one of these runs was trained on {count} of the rows of {source.name}", err=True)
    common.quiet()
    measured: list[list[perplexity.Nll]] = []
    with common.progress("predicting", len(compared) * sum(len(source.rows) for source in sources)) as advance:
        for run in compared:
            model = perplexity.opened(run)
            measured.append([perplexity.measure(model, source, batch, advance) for source in sources])
            del model
            gc.collect()  # its memory is for the next one
    rows = [
        {"run": str(run.folder), "data": source.name} | perplexity.metrics(nll, measured[0][place] if number else None)
        for place, source in enumerate(sources)
        for number, (run, nll) in enumerate(zip(compared, (each[place] for each in measured), strict=True))
    ]
    _print(rows)
    if output:
        comparison.write_rows(output, rows)


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    for heading in ("data", "run"):
        table.add_column(heading, overflow="fold")
    for heading in ("perplexity", "nats per token", f"change from {rows[0]['run']}", "rows", "tokens"):
        table.add_column(heading, justify="right")
    for number, row in enumerate(rows):
        is_next = number > 0 and rows[number - 1]["data"] == row["data"]
        table.add_row(
            "" if is_next else row["data"],
            row["run"],
            common.with_error(row, "perplexity", "{:.2f}"),
            common.with_error(row, "nats_per_token", "{:.3f}"),
            "" if row["difference"] is None else common.with_error(row, "difference", "{:+.3f}"),
            str(row["rows"]),
            str(row["tokens"]),
        )
    console = Console(highlight=False)
    console.print(table) if console.is_terminal else Console(highlight=False, width=160).print(table)
