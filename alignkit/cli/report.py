"""``alignkit report``."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import typer

from alignkit import paths
from alignkit.cli import completion
from alignkit.errors import ConfigError
from alignkit.reporting import numbers
from alignkit.runs import manifest


def report(
    folders: list[str] = typer.Argument(
        None,
        metavar="FOLDER",
        help="Folders of runs, or run folders, finished or not. Default: runs.",
        autocompletion=completion.run_folders,
    ),
    output: Path = typer.Option(
        None,
        "--output",
        "-o",
        parser=paths.expand,
        metavar="FILE",
        help="The HTML file. Default: report.html in FOLDER, or in the current folder if you name several.",
    ),
    open_it: bool = typer.Option(False, "--open", help="Open the report in a browser."),
) -> None:
    """Write an HTML report on runs: what was trained from what, whether it worked, and what it cost.

    The report is one file that needs no server and no network.
    """
    from alignkit.reporting import report as make

    given = [paths.expand(folder) for folder in folders or ["runs"]]
    if output is None:
        output = given[0] / "report.html" if len(given) == 1 and given[0].is_dir() else Path("report.html")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: no folder {output.parent}")
    page = make(given)
    manifest.write_atomically(output, page.html)
    for each in page.not_shown:
        typer.echo(f"not shown: {each.name}: {each.reason}")
    size = numbers.size(len(page.html.encode()))
    typer.echo(f"{output}: {numbers.count(page.runs, 'run')}, {size}. Open it in a browser")
    if open_it:
        webbrowser.open(output.absolute().as_uri())
