"""``alignkit clean``."""

from __future__ import annotations

import shutil

import typer

from alignkit import paths
from alignkit.cli import completion
from alignkit.cli.runs import size_of
from alignkit.errors import ConfigError
from alignkit.reporting import folders, numbers
from alignkit.runs import lock, manifest

CHECKPOINTS = "checkpoints"


def clean(
    given: list[str] = typer.Argument(
        None,
        metavar="FOLDER",
        help="Run folders, or folders of runs. Default: runs.",
        autocompletion=completion.run_folders,
    ),
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
    locked = {run.folder / CHECKPOINTS: manifest.unfinished(run.folder) for run in found if run.is_finished}
    if unfinished:
        locked |= {run.folder: run.folder for run in found if run.state == "stopped"}
    sizes = {target: size_of(target) for target in locked if target.is_dir()}
    for target, size in sizes.items():
        typer.echo(f"{numbers.size(size):>8}  {target}")
    if not sizes:
        typer.echo("nothing to delete")
        return
    if not yes:
        total = numbers.size(sum(sizes.values()))
        typer.confirm(f"Delete {numbers.count(len(sizes), 'folder')} with {total}?", abort=True)
    freed = 0
    for target, size in sizes.items():
        try:
            with lock.held(locked[target]):
                shutil.rmtree(target)
            freed += size
        except ConfigError:  # it was resumed meanwhile, or trains in a container, whose processes are not seen here
            typer.echo(f"not deleted: {target}: the run is training")
        except OSError as error:
            typer.echo(f"not deleted: {target}: {error.strerror or error}")
    typer.echo(f"freed {numbers.size(freed)}")
