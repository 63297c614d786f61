"""``alignkit clean``."""

from __future__ import annotations

import shutil

import typer

from alignkit import paths
from alignkit.cli.runs import size_of
from alignkit.reporting import folders, numbers

CHECKPOINTS = "checkpoints"


def clean(
    given: list[str] = typer.Argument(None, metavar="FOLDER", help="Run folders, or folders of runs. Default: runs."),
    unfinished: bool = typer.Option(
        False, "--unfinished", help="Also delete the folders of stopped runs, with all their files."
    ),
    yes: bool = typer.Option(False, "--yes", "-y", help="Delete without asking."),
) -> None:
    """Delete the checkpoints of finished runs, after asking.

    The trained model stays. Without its checkpoints, a run cannot be extended with `--resume`, nor compared with
    `compare --checkpoints`. A run that is training now is not touched.
    """
    found, _ = folders.find([paths.expand(folder) for folder in given or ["runs"]])
    targets = [run.folder / CHECKPOINTS for run in found if run.is_finished]
    if unfinished:
        targets += [run.folder for run in found if run.state == "stopped"]
    sizes = {target: size_of(target) for target in targets if target.is_dir()}
    for target, size in sizes.items():
        typer.echo(f"{numbers.size(size):>8}  {target}")
    if not sizes:
        typer.echo("nothing to delete")
        return
    total = numbers.size(sum(sizes.values()))
    if not yes:
        typer.confirm(f"Delete {numbers.count(len(sizes), 'folder')} with {total}?", abort=True)
    for target in sizes:
        shutil.rmtree(target)
    typer.echo(f"freed {total}")
