"""``alignkit train``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from alignkit.cli import common, processes
from alignkit.cli.stopping import on_sigterm
from alignkit.runs import manifest, stopping
from alignkit.runs.plan import Pipeline, pipeline
from alignkit.runs.resume import check_folders

if TYPE_CHECKING:
    from alignkit.protocols import Result


def train(
    overrides: list[str] = common.Overrides,
    plugin: list[str] = common.Plugins,
    config: Path = common.ConfigFile,
    model: str = common.Model,
    data: list[str] = common.Data,
    output: str = common.Output,
    trust: bool = common.Trust,
    resume: bool = typer.Option(False, "--resume", help="Continue an unfinished run, or extend a finished one."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Train the run again and replace the existing one."),
    plan_only: bool = typer.Option(False, "--plan", help="Print the plan and exit."),
    quiet: bool = common.Quiet,
    as_json: bool = common.Json,
) -> None:
    """Train a stage, after the stages that it needs.

    Example: alignkit train --plugin rm --data rankings.jsonl
    """
    processes.check_launcher()
    first = os.environ.get("RANK", "0") == "0"  # the process that prints, under accelerate and torchrun
    arguments = common.read_arguments(plugin, config, model, data, output, overrides)
    stoppable = on_sigterm("To continue, add --resume to the same command")
    with stoppable, common.only_result(quiet and not plan_only, as_json):
        planned = pipeline(*arguments, overwrite=overwrite, resume=resume, trusted=trust)
        if first:
            check_folders(planned.to_train, resume, overwrite, plan_only)
            common.print_pipeline(planned)
        results = [] if plan_only or not planned.to_train else _train(planned, resume, overwrite, first)
    if not first:
        return
    if not planned.to_train:
        manifest.remove_former(planned.finished[-1].folder)
    if as_json:
        common.print_json(common.pipeline_json(planned) if plan_only else _json(planned, results))
    elif not planned.to_train:
        typer.echo("\nnothing to train: a finished run with these settings exists. To train it again, add --overwrite")
    elif quiet and results:
        from alignkit.training.execution import describe

        typer.echo(describe(planned.to_train[-1], results[-1]))


def _train(planned: Pipeline, resume: bool, overwrite: bool, first: bool) -> list[Result]:
    """Train the runs, one after another. ``first`` is whether this process prints."""
    common.quiet()

    from alignkit.training.execution import Interrupted, execute_all

    def say(line: str) -> None:
        if first:
            typer.echo(line)

    try:
        results = execute_all(planned.to_train, resume=resume, overwrite=overwrite, say=say)
    except Interrupted as stop:
        if first:
            typer.echo(f"\n{stop}", err=True)
        raise typer.Exit(stopping.status(stop.signal)) from None
    stage = planned.to_train[-1].config.stage.component
    if stage.role == "policy":
        say(f"chat with it: alignkit chat {results[-1].folder}")
    say(f"look at the results: alignkit report {results[-1].folder.parent}")
    return results


def _json(planned: Pipeline, results: list[Result]) -> dict[str, object]:
    """The requested run, and the folders of all runs that were trained."""
    folder = results[-1].folder if results else planned.finished[-1].folder
    record = manifest.read(folder)
    trained = {str(result.folder): round(result.seconds, 1) for result in results}  # -> its seconds
    return {"folder": str(folder), "stage": record["stage"], "metrics": record["metrics"], "trained": trained}
