"""``alignkit train``."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from alignkit.cli import common
from alignkit.runs.plan import pipeline
from alignkit.runs.resume import check_folder


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
) -> None:
    """Train a stage, after the stages that it needs.

    Example: alignkit train --plugin rm --data rankings.jsonl
    """
    first = os.environ.get("RANK", "0") == "0"  # the process that prints, under accelerate and torchrun
    arguments = common.read_arguments(plugin, config, model, data, output, overrides)
    planned = pipeline(*arguments, overwrite=overwrite, resume=resume, trusted=trust)
    if first:
        for plan in planned.to_train:
            check_folder(plan.config, resume, overwrite, plan_only)
        common.print_pipeline(planned)
        if not planned.to_train:
            typer.echo(
                "\nnothing to train: a finished run with these settings exists. To train it again, add --overwrite"
            )
    if plan_only or not planned.to_train:
        return
    common.quiet()

    from alignkit.training.execution import Interrupted, execute_all

    def say(line: str) -> None:
        if first:
            typer.echo(line)

    try:
        results = execute_all(planned.to_train, resume=resume, overwrite=overwrite, say=say)
    except Interrupted as stop:
        typer.echo(f"\n{stop}", err=True)
        raise typer.Exit(130) from None
    stage = planned.to_train[-1].config.stage.component
    if stage.role == "policy":
        say(f"chat with it: alignkit chat {results[-1].folder}")
    say(f"look at the results: alignkit report {results[-1].folder.parent}")
