"""``alignkit export``."""

from __future__ import annotations

from pathlib import Path

import typer

from alignkit import paths
from alignkit.cli import common


def export(
    run: str = typer.Argument(metavar="RUN", help="The run folder of a policy or a reward model."),
    to: Path = typer.Option(..., "--to", metavar="FOLDER", help="The folder to write. It must not exist."),
    dtype: str = typer.Option("bfloat16", help="The number format: bfloat16, float16 or float32."),
    base: str = typer.Option(
        "run",
        metavar="run|original",
        help="What an adapter is merged into: the base as it was in training, dequantized if it was quantized; or the "
        "base as its files have it.",
    ),
    max_shard_size: str = typer.Option("5GB", metavar="SIZE", help="The largest size of a file of weights."),
) -> None:
    """Write a run as a model that plain Transformers opens, and check that it equals the run."""
    from alignkit.exporting import source

    folder = paths.expand(run)
    source.read(folder)  # before torch is imported
    common.quiet()
    from alignkit.exporting import export as write
    from alignkit.models.memory import release_freed_tensors

    release_freed_tensors()

    write(folder, to, dtype=dtype, base=base, max_shard_size=max_shard_size, say=typer.echo)
