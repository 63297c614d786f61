"""``alignkit check``."""

from __future__ import annotations

from pathlib import Path

import typer

from alignkit.cli import common
from alignkit.runs.plan import pipeline
from alignkit.runs.resume import check_folders


def check(
    overrides: list[str] = common.Overrides,
    plugin: list[str] = common.Plugins,
    config: Path = common.ConfigFile,
    model: str = common.Model,
    data: list[str] = common.Data,
    output: str = common.Output,
    as_json: bool = common.Json,
    trust: bool = common.Trust,
) -> None:
    """Check a training command and print its plan. Takes the arguments of train and loads no model.

    Example: alignkit check --plugin sft --plugin qlora --data demos.jsonl
    """
    arguments = common.read_arguments(plugin, config, model, data, output, overrides)
    planned = pipeline(*arguments, trusted=trust)
    if not as_json:
        common.print_pipeline(planned)
    check_folders(planned.to_train, resume=False, overwrite=False, plan_only=True)
    if as_json:
        common.print_json(common.pipeline_json(planned))
        return
    typer.echo(f"\n{'ok':>11}  {'training can start' if planned.to_train else 'nothing to train'}")
