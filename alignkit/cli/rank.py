"""``alignkit rank``."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from alignkit.cli import common
from alignkit.data.sources import READERS
from alignkit.errors import DataError
from alignkit.evaluation import judges
from alignkit.generation import rankings
from alignkit.runs import manifest


def rank(
    file: Path = typer.Argument(
        metavar="FILE", help="Rows with a prompt and responses, as `alignkit sample` writes them."
    ),
    overrides: list[str] = typer.Argument(None, metavar="reward.KEY=VALUE", help="Settings of the reward."),
    by: str = typer.Option(
        ...,
        "--by",
        metavar="NAME",
        help="The scorer: a reward run, a reward, or module:function. Higher is better.",
    ),
    plugin: list[str] = common.Plugins,
    batch: int = typer.Option(16, min=1, help="Answers per batch of a reward run."),
    output: Path = typer.Option(..., "--output", "-o", metavar="FILE", help="The file for the rankings."),
) -> None:
    """Rank sampled answers by score. Adds "ranks" to each row: 0 is best, equal ranks are a tie."""
    if not file.is_file():
        raise DataError(f"no file {file}")
    if file.suffix not in READERS:
        raise DataError(f"{file}: data files must end in {', '.join(READERS)}")
    judge = judges.named("--by", by, plugin, overrides or [])
    if judge.loads:
        common.quiet()
    score = judge.open(batch, typer.echo)
    lines, tied = [], 0
    for where, row in READERS[file.suffix](file):
        if isinstance(row, DataError):
            raise row
        answers = row.get("responses")
        if not isinstance(answers, list) or not answers or not row.get("prompt"):
            raise DataError(f"{where}: the row needs a prompt and a list of responses")
        ranks = rankings.ranks(score(judges.of_texts(row["prompt"], answers)))
        tied += len(set(ranks)) == 1
        lines.append(json.dumps({**row, "ranks": ranks}, ensure_ascii=False))
    manifest.write_atomically(output, "".join(line + "\n" for line in lines))
    typer.echo(f"wrote {len(lines)} rankings to {output}" + (f" ({tied} of them tie all answers)" if tied else ""))
