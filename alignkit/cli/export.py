"""``alignkit export``."""

from __future__ import annotations

from pathlib import Path

import typer

from alignkit import paths
from alignkit.cli import common, completion
from alignkit.exporting import gguf, source
from alignkit.exporting.further import Further, is_export


def export(
    run: str = typer.Argument(
        metavar="RUN", autocompletion=completion.run_folders, help="The run folder of a policy or a reward model."
    ),
    to: Path = typer.Option(
        ...,
        "--to",
        parser=paths.expand,
        metavar="FOLDER",
        help="The folder to write. It must not exist, unless it holds this export and the options below add to it.",
    ),
    dtype: str = typer.Option("bfloat16", help="The dtype of the weights: bfloat16, float16 or float32."),
    base: str = typer.Option(
        "run",
        metavar="run|original",
        help="What an adapter is merged into: the base as it was in training, dequantized if it was quantized; or the "
        "base as its files have it.",
    ),
    max_shard_size: str = typer.Option("5GB", metavar="SIZE", help="The largest size of a file of weights."),
    gguf_kind: gguf.Kind = typer.Option(None, "--gguf", help="Also write a GGUF file, by llama.cpp's converter."),
    llama_cpp: Path = typer.Option(
        None,
        parser=paths.expand,
        metavar="DIR",
        help="The folder of llama.cpp. Default: its convert_hf_to_gguf.py on the PATH.",
    ),
    ollama: bool = typer.Option(False, "--ollama", help="Also write a Modelfile for Ollama."),
    push: str = typer.Option(
        None, metavar="USER/NAME", help="Upload the folder to a new private repository on the Hugging Face Hub."
    ),
    public: bool = typer.Option(False, "--public", help="With --push: a public repository."),
) -> None:
    """Write a run as a standard Transformers model, and verify it against the run."""
    folder = paths.expand(run)
    record = source.read(folder)  # before torch is imported
    further = Further(gguf_kind, llama_cpp, ollama, push, public)
    further.check(record)
    common.quiet()
    from alignkit.exporting import export as write
    from alignkit.models.memory import release_freed_tensors

    release_freed_tensors()

    settings = {"dtype": dtype, "base": base, "max_shard_size": max_shard_size}
    if further.is_asked_for and is_export(to, record, settings):
        typer.echo(f"{to} holds this export already")
    else:
        write(folder, to, **settings, say=typer.echo)
    further.do(to, typer.echo)
