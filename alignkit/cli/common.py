"""What several commands share."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import typer

from alignkit import yaml
from alignkit.config import RunConfig, merge, parse_override, resolve
from alignkit.plan import Plan
from alignkit.registry import Registry

Plugins = typer.Option(
    [], "--plugin", "-p", metavar="NAME", help="Activate a plugin and pick its components of that name. Repeatable."
)
ConfigFile = typer.Option(None, "--config", "-c", metavar="FILE", help="A YAML config file.")
Model = typer.Option(None, "--model", "-m", metavar="MODEL", help="Base model: a hub id or a folder.")
Data = typer.Option(None, "--data", "-d", metavar="DATA", help="A file, a folder or a hub id.")
Output = typer.Option(None, "--output", "-o", metavar="DIR", help="Where run folders are made.")
Overrides = typer.Argument(None, metavar="[KEY.PATH=VALUE]...", help="Settings that win over the file's.")


def resolve_arguments(
    plugins: list[str],
    file: Path | None,
    model: str | None,
    data: str | None,
    output: str | None,
    overrides: list[str] | None,
) -> tuple[Registry, RunConfig]:
    """The config that a command line asks for."""
    flags: dict[str, Any] = {"plugins": plugins, "model": model, "output": output}
    given = {key: value for key, value in flags.items() if value}
    if data:
        given["data"] = {"path": data}
    cli = merge(given, *(parse_override(text) for text in overrides or []))
    registry = Registry()
    return registry, resolve(registry, yaml.load(file) if file else {}, cli)


def print_plan(plan: Plan) -> None:
    """The plan, a line each."""
    for label, text in plan.describe():
        typer.echo(f"{label:>10}  {text}")
    for why in [*plan.source.skipped, *(plan.eval_source.skipped if plan.eval_source else [])][:3]:
        typer.echo(f"   skipped  {why}")


def quiet() -> None:
    """Keep libraries from talking over the run; ``--debug`` lets them. Called before torch is imported."""
    if os.environ.get("ALIGNKIT_DEBUG"):
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
