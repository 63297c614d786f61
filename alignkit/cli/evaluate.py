"""``alignkit evaluate``."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from alignkit import paths
from alignkit.cli import common, completion, tables, terminal
from alignkit.data import outputs
from alignkit.errors import ConfigError
from alignkit.evaluation import comparison, perplexity, task_metrics, tasks
from alignkit.evaluation.perplexity import Nll, Policy
from alignkit.evaluation.task_metrics import TaskMetric
from alignkit.evaluation.tasks import TaskSettings
from alignkit.runs import evaluations

ROWS = 200  # of each source, unless --limit is set

Table = dict[str, list[dict[str, Any]]]  # "perplexity" and "tasks": a row per run and metric


def evaluate(
    runs: list[str] = typer.Argument(
        metavar="RUN",
        autocompletion=completion.run_folders,
        help="Run folders, compared with the first one. A single run is compared with the run or base model that it "
        "started from.",
    ),
    data: list[str] = typer.Option(
        [],
        "--data",
        "-d",
        metavar="DATA",
        help="Texts or demonstrations: a file, a folder or a hub id. Repeatable. Default without --tasks: held-out "
        "demonstrations.",
    ),
    names: str = typer.Option(
        None,
        "--tasks",
        metavar="NAMES",
        help="Tasks of lm-eval, separated by commas: names, patterns or YAML files. Needs alignkit[lm-eval].",
    ),
    num_fewshot: int = typer.Option(None, min=0, help="Examples in each prompt of a task. Default: that of the task."),
    chat_template: bool = typer.Option(
        False, "--apply-chat-template", help="Apply the run's chat template to the prompts of tasks."
    ),
    output: Path = typer.Option(
        None, "--output", "-o", parser=paths.expand, metavar="FILE", help="Write the table to a .jsonl file."
    ),
    quiet: bool = common.Quiet,
    as_json: bool = common.Json,
    limit: float = typer.Option(
        None,
        min=0,
        help=f"Maximum number of rows of each source (default: {ROWS}) and of documents of each task (default: all; "
        "below 1: a share of them).",
    ),
    batch: int = typer.Option(8, min=1, help="Rows per batch."),
) -> None:
    """Measure perplexity or lm-eval scores of runs, and compare them with another run.

    Example: alignkit evaluate runs/ppo --data texts.jsonl
    """
    if output and output.suffix != ".jsonl":
        raise ConfigError(f"--output {output}: the file must end in .jsonl")
    if output:
        outputs.check("--output", output, *data)
    if names is None and (num_fewshot is not None or chat_template):
        raise ConfigError(f"{'--num-fewshot' if num_fewshot is not None else '--apply-chat-template'} needs --tasks")
    wanted = [] if names is None else [name.strip() for name in names.split(",")]
    if "" in wanted:
        raise ConfigError(f"--tasks '{names}': a name is empty")
    is_share = limit is not None and 0 < limit < 1 and names is not None and not data
    if limit is not None and not is_share and (limit < 1 or not limit.is_integer()):
        raise ConfigError(f"--limit {limit:g} must be a whole number or, for --tasks without --data, a share below 1")
    with common.only_result(quiet, as_json):
        policies = perplexity.policies_of(runs)
        compared = [policy.run for policy in policies]
        if len(policies) == 1:
            _warn(
                f"warning: the run that {policies[0].name} started from is gone or was trained again: there is nothing "
                "to compare it with"
            )
        sources = perplexity.sources_of(data, compared, int(limit or ROWS)) if data or names is None else []
        for source in sources:
            if count := perplexity.trained_on(source, compared):
                _warn(f"warning: one of these runs was trained on {count} of the rows of {source.name}")
        common.quiet()
        loaded = tasks.load(wanted) if wanted else None
        settings = TaskSettings(limit, num_fewshot, chat_template, batch)
        on_texts, on_tasks = list[list[Nll]](), list[list[TaskMetric]]()
        for policy in policies:
            model = perplexity.opened(policy)
            on_tasks.append(tasks.measure(model, loaded, settings, _warn) if loaded else [])
            with common.progress(f"predicting: {policy.name}", sum(len(source.rows) for source in sources)) as advance:
                on_texts.append([perplexity.measure(model, source, batch, advance) for source in sources])
            del model
            gc.collect()  # its memory is for the next one
        tables = {
            "perplexity": _perplexity_rows(policies, [source.name for source in sources], on_texts),
            "tasks": _task_rows(policies, on_tasks, settings),
        }
    if as_json:
        common.print_json(tables)
    else:
        _print(tables)
    if output:
        comparison.write_rows(output, [*tables["perplexity"], *tables["tasks"]])
    for policy in policies:
        if not policy.is_base:
            _record(policy, tables)


def _warn(line: str) -> None:
    typer.echo(line, err=True)


def _perplexity_rows(
    policies: Sequence[Policy], sources: Sequence[str], measured: Sequence[Sequence[Nll]]
) -> list[dict[str, Any]]:
    return [
        {"run": policy.name, "compared_with": _other(policies, number), "data": source}
        | perplexity.metrics(measured[number][place], measured[0][place] if number else None)
        for place, source in enumerate(sources)
        for number, policy in enumerate(policies)
    ]


def _task_rows(
    policies: Sequence[Policy], measured: Sequence[Sequence[TaskMetric]], settings: TaskSettings
) -> list[dict[str, Any]]:
    """The rows of each metric together, one per run."""
    shared = {"limit": settings.limit, "apply_chat_template": settings.apply_chat_template}
    of_runs = [
        [{"run": policy.name, "compared_with": _other(policies, number), **row, **shared} for row in rows]
        for number, policy in enumerate(policies)
        for rows in [task_metrics.rows(measured[number], measured[0] if number else None)]
    ]
    return [row for rows in zip(*of_runs, strict=True) for row in rows]


def _other(policies: Sequence[Policy], number: int) -> str | None:
    return policies[0].name if number else None


def _record(policy: Policy, tables: Table) -> None:
    """Add what was measured on a run to its folder, for reports and model cards."""
    own = {name: [_without_run(row) for row in rows if row["run"] == policy.name] for name, rows in tables.items()}
    try:
        evaluations.add(policy.run.folder, own)
    except OSError as error:
        _warn(f"warning: {policy.run.folder / evaluations.FILE} was not written: {error.strerror}")


def _without_run(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "run"}


# --- the tables ------------------------------------------------------------------------------------------------------


def _print(tables: Table) -> None:
    if rows := tables["perplexity"]:
        columns = ("perplexity", "nats per token", f"change from {rows[0]['run']}", "rows", "tokens")
        _print_table(("data", "run"), columns, [(row["data"], row["run"], _perplexity_cells(row)) for row in rows])
    if rows := tables["tasks"]:
        of_tasks = ("shots", "value", f"change from {rows[0]['run']}", "documents")
        _print_table(("task", "run"), of_tasks, [(_task_name(row), row["run"], _task_cells(row)) for row in rows])


def _perplexity_cells(row: dict[str, Any]) -> list[str]:
    return [
        tables.with_error(row, "perplexity", "{:.2f}"),
        tables.with_error(row, "nats_per_token", "{:.3f}"),
        tables.with_error(row, "difference", "{:+.3f}"),
        str(row["rows"]),
        str(row["tokens"]),
    ]


def _task_name(row: dict[str, Any]) -> str:
    """Such as ``arc_easy acc ↑``: the arrow points to better values."""
    arrow = {True: " ↑", False: " ↓", None: ""}[row["higher_is_better"]]
    extracted = "" if row["filter"] == "none" else f" ({row['filter']})"
    return f"{row['task']} {row['metric']}{extracted}{arrow}"


def _task_cells(row: dict[str, Any]) -> list[str]:
    return [
        "" if row["num_fewshot"] is None else str(row["num_fewshot"]),
        tables.with_error({"value": row["value"], "value_error": row["error"]}, "value", "{:.4f}"),
        tables.with_error(row, "difference", "{:+.4f}"),
        str(row["documents"]),
    ]


def _print_table(headings: tuple[str, str], columns: Sequence[str], rows: Sequence[tuple[str, str, list[str]]]) -> None:
    """Print a table whose first column is shown once for rows that share it."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table as RichTable

    table = RichTable(box=SIMPLE, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for heading in columns:
        table.add_column(heading, justify="right")
    before = None
    for group, run, cells in rows:
        table.add_row(*map(terminal.cell, ("" if group == before else group, run, *cells)))
        before = group
    console = Console(highlight=False)
    console.print(table) if console.is_terminal else Console(highlight=False, width=160).print(table)
