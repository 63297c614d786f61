"""``alignkit score``."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import typer

from alignkit.cli import common
from alignkit.config import DataConfig
from alignkit.data.reading import read
from alignkit.errors import DataError
from alignkit.registry import Registry
from alignkit.rows import Demonstration, Located, Ranking, Tools
from alignkit.runs import lineage

WINDOW = 256  # rows in memory at a time


def score(
    run: str = typer.Argument(metavar="RUN", help="The run folder of a reward model."),
    file: str = typer.Argument(
        metavar="FILE", help="Rows with a prompt and one or more answers: a file, a folder or a hub id."
    ),
    output: Path = typer.Option(
        None, "--output", "-o", metavar="FILE", help="The output file. Default: standard output."
    ),
    batch: int = typer.Option(16, min=1, help="Answers per batch."),
    data_format: str = typer.Option(
        None, "--format", metavar="NAME", help="The data format of the rows. Default: detected."
    ),
) -> None:
    """Score answers with a reward model. Writes one row each: {"prompt": ..., "response": ..., "score": ...}."""
    parent = lineage.named("score", run, "reward")
    rows = read(Registry(), DataConfig(format=data_format), file, (Demonstration, Ranking))
    first = next(rows, None)
    if first is None:
        raise DataError(f"{file} has no rows to score")
    common.quiet()
    from alignkit.generation.scoring import RewardModel

    assert parent.manifest is not None
    scorer = RewardModel(parent.folder, parent.manifest)
    unfinished = output.with_name(f".{output.name}.unfinished") if output else None
    stream = unfinished.open("w", encoding="utf-8") if unfinished else sys.stdout
    with common.progress("scoring", None) as advance:
        remaining = itertools.chain([first], rows)
        while window := list(itertools.islice(remaining, WINDOW)):
            texts = [_answers(row) for row in window]
            encoded = [
                scorer.encode(prompt, answer, tools)
                for (prompt, answers), tools in zip(texts, map(_tools, window), strict=True)
                for answer in answers
            ]
            scores = iter(scorer.scores(encoded, batch))
            for (prompt, answers), (_, row) in zip(texts, window, strict=True):
                own = [round(next(scores), 6) for _ in answers]
                line: dict[str, Any] = {"prompt": prompt}
                if isinstance(row, Ranking):
                    line |= {"responses": answers, "ranks": row.ranks, "scores": own}
                else:
                    line |= {"response": answers[0], "score": own[0]}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            stream.flush()
            advance(len(window))
    if output and unfinished:
        stream.close()
        unfinished.replace(output)


def _tools(located: Located) -> Tools | None:
    assert isinstance(located.row, Ranking | Demonstration)
    return located.row.tools


def _answers(located: Located) -> tuple[Any, list[str]]:
    row = located.row
    if isinstance(row, Ranking):
        return row.prompt, row.answers
    assert isinstance(row, Demonstration)
    if row.messages[-1]["role"] != "assistant":
        raise DataError(f"{located.where}: the last message must be from the assistant")
    return row.messages[:-1], [row.messages[-1]["content"]]
