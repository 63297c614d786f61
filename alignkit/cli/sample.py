"""``alignkit sample``."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from alignkit.cli import common


def sample(
    run: str = typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, a model folder, a hub id."),
    prompts: str = typer.Argument(help="Rows with prompts: a file, a folder, a hub id. Rankings and the like will do."),
    output: Path = typer.Option(..., "--output", "-o", metavar="FILE", help="Where to write; a part is continued."),
    k: int = typer.Option(4, "-k", min=1, help="Answers a prompt."),
    max_new_tokens: int = typer.Option(256, min=1, help="How long an answer may become."),
    temperature: float = typer.Option(1.0, min=0.0, help="0: always the likeliest token."),
    top_p: float = typer.Option(
        1.0, min=0.0, max=1.0, help="Draw from the likeliest tokens with this much probability."
    ),
    batch: int = typer.Option(16, min=1, help="Prompts at a time."),
    seed: int = typer.Option(0, help="The same seed, the same answers."),
) -> None:
    """Write K answers a prompt, a row each: {"prompt": ..., "responses": [...]}, ready to be ranked."""
    from alignkit.generation.chat import locate
    from alignkit.generation.rankings import continued, prompts_of, short

    where = locate(run)  # mistakes are told before torch is imported
    rows = prompts_of(prompts)
    done = continued(output, rows, k, batch)
    if done:
        typer.echo(f"{output} has {done} of {len(rows)} rows already")
    common.quiet()
    import transformers

    from alignkit.batches import Sampling
    from alignkit.data.chat_template import prompt_ids
    from alignkit.generation.chat import open_model
    from alignkit.generation.sampling import sample as draw
    from alignkit.generation.sampling import text

    opened = open_model(where)
    how = Sampling(max_new_tokens, temperature, tuple(opened.stop_ids), top_p, samples=k)
    with output.open("a", encoding="utf-8") as file, common.progress("sampling", len(rows), done) as advance:
        for start in range(done, len(rows), batch):
            part = rows[start : start + batch]
            transformers.set_seed(seed + start)  # so that a continued file is the file that one go would have made
            ids = [prompt_ids(opened.tokenizer, row) for row in part]
            answers = [text(opened.tokenizer, answer) for answer in draw(opened.model, opened.tokenizer, ids, how)]
            lines = [{"prompt": short(row), "responses": answers[i * k : i * k + k]} for i, row in enumerate(part)]
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            advance(len(part))
    typer.echo(f"{len(rows)} prompts with {k} answers each are in {output}")
