"""``alignkit score``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer

from alignkit import paths
from alignkit.cli import common, completion
from alignkit.data import outputs
from alignkit.generation import score_rows
from alignkit.runs import lineage, manifest


def score(
    run: str = typer.Argument(
        metavar="RUN",
        help="The run folder of a reward model.",
        autocompletion=completion.run_folders,
    ),
    file: str = typer.Argument(
        metavar="FILE", help="Rows with a prompt and one or more answers: a file, a folder or a hub id."
    ),
    output: Path = typer.Option(
        None, "--output", "-o", parser=paths.expand, metavar="FILE", help="The output file. Default: standard output."
    ),
    batch: int = typer.Option(16, min=1, help="Answers per batch."),
    data_format: str = typer.Option(
        None, "--format", metavar="NAME", help="The data format of the rows. Default: detected."
    ),
    quiet: bool = common.Quiet,
) -> None:
    """Score answers with a reward model. Writes one row each: {"prompt": ..., "response": ..., "score": ...}.

    Example: alignkit score runs/rm demos.jsonl --output scores.jsonl
    """
    parent = lineage.named("score", run, "reward")
    if output:
        outputs.check_rows("--output", output, file)
    rows = score_rows.read_answers(file, data_format)
    unfinished = output.with_name(f".{output.name}.unfinished") if output else None
    stream = unfinished.open("w", encoding="utf-8") if unfinished else sys.stdout
    with common.only_result(quiet, as_json=output is None):
        common.quiet()
        with common.progress("scoring", None) as advance:
            for row in score_rows.scored(parent, rows, batch, advance):
                stream.write(json.dumps(manifest.plain_json(row), ensure_ascii=False) + "\n")
                stream.flush()
    if output and unfinished:
        stream.close()
        unfinished.replace(output)
