"""``alignkit sample``."""

from __future__ import annotations

from pathlib import Path

import typer

from alignkit import paths
from alignkit.cli import common, completion


def sample(
    run: str = typer.Argument(
        metavar="RUN_OR_MODEL",
        help="A run folder, a model folder or a hub id.",
        autocompletion=completion.run_folders,
    ),
    prompts: str = typer.Argument(
        metavar="PROMPTS", help="Rows with prompts, in any data format: a file, a folder or a hub id."
    ),
    overrides: list[str] = common.ModelKwargs,
    output: Path = typer.Option(
        ...,
        "--output",
        "-o",
        parser=paths.expand,
        metavar="FILE",
        help="The output file. An incomplete file is continued.",
    ),
    k: int = common.K,
    max_new_tokens: int = common.MaxNewTokens,
    temperature: float = common.Temperature,
    top_p: float = common.TopP,
    batch: int = common.PromptsPerBatch,
    seed: int = common.Seed,
    quiet: bool = common.Quiet,
) -> None:
    """Sample answers to prompts. Writes one row per prompt: {"prompt": ..., "responses": [...], ...}.

    Example: alignkit sample runs/sft prompts.jsonl -k 4 --output samples.jsonl
    """
    from alignkit.generation import sample_files

    settings = sample_files.Settings(max_new_tokens, temperature, top_p, seed)
    kwargs = common.model_kwargs_of(run, overrides)
    with common.only_result(quiet):
        samples = sample_files.plan(run, prompts, output, k, batch, settings, kwargs)
        common.sample(samples)
    typer.echo(f"wrote {len(samples.prompts)} prompts with {k} answers each to {output}")
