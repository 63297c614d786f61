"""``alignkit train``."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from alignkit.cli import common
from alignkit.plan import check_folder
from alignkit.plan import make as make_plan


def train(
    overrides: list[str] = common.Overrides,
    plugin: list[str] = common.Plugins,
    config: Path = common.ConfigFile,
    model: str = common.Model,
    data: str = common.Data,
    output: str = common.Output,
    resume: bool = typer.Option(False, "--resume", help="Go on with an unfinished run."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace a run that is there."),
) -> None:
    """Train a stage: alignkit train --plugin sft --plugin qlora --data demos.jsonl train.num_train_epochs=3"""
    registry, resolved = common.resolve_arguments(plugin, config, model, data, output, overrides)
    first = os.environ.get("RANK", "0") == "0"  # under accelerate, one process looks and speaks
    if first:
        check_folder(resolved.folder, resume, overwrite)
    plan = make_plan(registry, resolved)
    if first:
        common.print_plan(plan)
        typer.echo()
    common.quiet()

    from alignkit.run import Interrupted, execute

    try:
        result = execute(plan, resume=resume, overwrite=overwrite, say=typer.echo if first else lambda line: None)
    except Interrupted as stop:
        typer.echo(f"\n{stop}", err=True)
        raise typer.Exit(130) from None
    if first:
        before, after = result.metrics.get("first_eval_loss"), result.metrics.get("eval_loss")
        fell = f"held-out loss {before:.4f} -> {after:.4f}, " if before is not None and after is not None else ""
        typer.echo(f"\ndone in {result.seconds:.0f} s: {fell}run folder {result.folder}")
        typer.echo(f"talk to it: alignkit chat {result.folder}")
