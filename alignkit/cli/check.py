"""``alignkit check``."""

from __future__ import annotations

from pathlib import Path

import typer

from alignkit.cli import common
from alignkit.plan import check_folder
from alignkit.plan import make as make_plan


def check(
    overrides: list[str] = common.Overrides,
    plugin: list[str] = common.Plugins,
    config: Path = common.ConfigFile,
    model: str = common.Model,
    data: str = common.Data,
    output: str = common.Output,
) -> None:
    """Say what `train` would do, and what is wrong with it, without loading a model."""
    registry, resolved = common.resolve_arguments(plugin, config, model, data, output, overrides)
    common.print_plan(make_plan(registry, resolved))
    check_folder(resolved.folder, resume=True, overwrite=False)
    typer.echo("        ok  train can start")
