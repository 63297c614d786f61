"""``alignkit sample``."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from alignkit.cli import common


def sample(
    run: str = typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, a model folder or a hub id."),
    prompts: str = typer.Argument(
        metavar="PROMPTS", help="Rows with prompts, in any data format: a file, a folder or a hub id."
    ),
    output: Path = typer.Option(
        ..., "--output", "-o", metavar="FILE", help="The output file. An incomplete file is continued."
    ),
    k: int = typer.Option(4, "-k", min=1, help="Answers per prompt."),
    max_new_tokens: int = typer.Option(256, min=1, help="Maximum tokens of an answer."),
    temperature: float = typer.Option(1.0, min=0.0, help="Sampling temperature; 0 is greedy decoding."),
    top_p: float = typer.Option(
        1.0,
        min=0.0,
        max=1.0,
        help="Nucleus sampling: sample from the most likely tokens with this total probability.",
    ),
    batch: int = typer.Option(16, min=1, help="Prompts per batch."),
    seed: int = typer.Option(0, help="Random seed; the same seed gives the same answers."),
) -> None:
    """Sample answers to prompts. Writes one row per prompt: {"prompt": ..., "responses": [...]}."""
    from alignkit.generation.chat import locate
    from alignkit.generation.rankings import continued, prompts_of, short

    where = locate(run)  # before torch is imported, so that mistakes fail at once
    rows = prompts_of(prompts)
    done = continued(output, rows, k, batch)
    if done:
        typer.echo(f"{output} already has {done} of {len(rows)} rows")
    common.quiet()
    import transformers

    from alignkit.batches import Sampling
    from alignkit.data.chat_template import prompt_ids
    from alignkit.generation.chat import open_model
    from alignkit.generation.sampling import sample as draw
    from alignkit.generation.sampling import text

    opened = open_model(where)
    sampling = Sampling(max_new_tokens, temperature, tuple(opened.stop_ids), top_p, samples=k)
    with output.open("a", encoding="utf-8") as file, common.progress("sampling", len(rows), done) as advance:
        for start in range(done, len(rows), batch):
            chunk = rows[start : start + batch]
            transformers.set_seed(seed + start)  # a continued file equals one written without interruption
            ids = [prompt_ids(opened.tokenizer, row) for row in chunk]
            answers = [text(opened.tokenizer, answer) for answer in draw(opened.model, opened.tokenizer, ids, sampling)]
            lines = [{"prompt": short(row), "responses": answers[i * k : i * k + k]} for i, row in enumerate(chunk)]
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            advance(len(chunk))
    typer.echo(f"wrote {len(rows)} prompts with {k} answers each to {output}")
