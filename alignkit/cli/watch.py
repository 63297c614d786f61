"""``alignkit watch``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from alignkit import paths
from alignkit.cli import completion, terminal
from alignkit.errors import ConfigError, suggestion
from alignkit.runs import curves, lock, manifest, recorded, resume


def watch(
    run: str = typer.Argument(
        metavar="RUN",
        help="A run folder, finished or not.",
        autocompletion=completion.run_folders,
    ),
    every: float = typer.Option(2.0, min=0.1, metavar="SECONDS", help="Seconds between updates."),
) -> None:
    """Show the curves of a run in the terminal, while it trains. Ends with the run. Ctrl-C does not stop the run."""
    from rich.console import Console, Group
    from rich.live import Live

    folder = paths.expand(run)
    stage = recorded.stage(recorded.read(_current(folder)))
    first = stage.watch if stage else ()
    console = Console(highlight=False)
    if not console.is_terminal:
        state, table = _shown(folder, first)
        typer.echo(state)
        Console(highlight=False, width=120).print(table)
        return

    def group() -> Group:
        state, table = _shown(folder, first)
        return Group(terminal.cell(state), table)

    with Live(group(), console=console, auto_refresh=False) as live:
        while _is_training(folder):
            time.sleep(every)
            live.update(group(), refresh=True)


def _current(folder: Path) -> Path:
    """The folder that has the newest metrics: of the unfinished run, else of the finished one.

    Raises:
        ConfigError: no run is in it.
    """
    for each in (manifest.unfinished(folder), folder):
        if (each / recorded.CONFIG).is_file():
            return each
    beside = [each.name.removesuffix(".unfinished") for each in folder.parent.glob("*/")]
    raise ConfigError(suggestion(f"watch: {folder} is not the folder of a run", folder.name, beside))


def _is_training(folder: Path) -> bool:
    return lock.is_held(manifest.unfinished(folder))


def _shown(folder: Path, first: Sequence[str]) -> tuple[str, Any]:
    """A line on the state of the run, and the table of its curves."""
    from rich.box import SIMPLE
    from rich.table import Table

    current = _current(folder)
    file = current / resume.METRICS
    of_run = curves.read(file, first) if file.exists() else []
    step = max((points[-1].step for curve in of_run for points in curve[1:] if points), default=0)
    state = "is training" if _is_training(folder) else "finished" if manifest.is_run(current) else "stopped"
    hint = "; continue with --resume" if state == "stopped" else ""
    table = Table(box=SIMPLE, pad_edge=False)
    for heading in ("metric", "training", "last", "held out", "last held out"):
        table.add_column(heading, justify="right" if heading.startswith("last") else "left", no_wrap=True)
    for curve in of_run:
        cells = (curve.name, curves.sparkline(curve.train), _last(curve.train), *_held_out(curve.held_out))
        table.add_row(*map(terminal.cell, cells))
    return f"{folder}: {state} at step {step}{hint}", table


def _held_out(points: Sequence[curves.Point]) -> tuple[str, str]:
    return curves.sparkline(points, width=20), _last(points)


def _last(points: Sequence[curves.Point]) -> str:
    if not points:
        return ""
    error = points[-1].error
    return f"{points[-1].value:.4g}" + ("" if error is None else f" ± {error:.2g}")
