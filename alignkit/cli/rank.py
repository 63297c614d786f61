"""``alignkit rank``."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import typer

from alignkit import manifest, rankings
from alignkit.data import READERS
from alignkit.errors import DataError


def rank(
    file: Path = typer.Argument(help="Rows with prompt and responses, as `alignkit sample` writes them."),
    by: str = typer.Option(
        ..., "--by", metavar="MODULE:FUNCTION", help="prompts, answers -> scores; higher is better."
    ),
    output: Path = typer.Option(..., "--output", "-o", metavar="FILE", help="Where to write the rankings."),
) -> None:
    """Rank sampled answers by a function: the rows again, with "ranks" (0 is best, equal is a tie)."""
    if not file.is_file() or file.suffix not in READERS:
        raise DataError(f"no file {file} of {', '.join(READERS)}")
    scorer = rankings.function(by)
    lines, tied = [], 0
    for where, row in READERS[file.suffix](file):
        if isinstance(row, DataError):
            raise row
        answers = row.get("responses")
        if not isinstance(answers, list) or not answers or not row.get("prompt"):
            raise DataError(f"{where}: needs prompt and responses")
        prompts = [rankings.prompt_text(row["prompt"])] * len(answers)
        ranks = rankings.ranks(rankings.checked(by, functools.partial(scorer, prompts, answers), answers))
        tied += len(set(ranks)) == 1
        lines.append(json.dumps({**row, "ranks": ranks}, ensure_ascii=False))
    manifest.write_atomically(output, "".join(line + "\n" for line in lines))
    typer.echo(f"{len(lines)} rankings in {output}" + (f"; in {tied} of them all answers are equal" if tied else ""))
