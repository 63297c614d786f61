"""Options and output that several commands share."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from alignkit import yaml
from alignkit.config.resolve import parse_override, requested_stage
from alignkit.config.settings import merge
from alignkit.progress import progress as progress
from alignkit.registry import Registry
from alignkit.runs import plan_text
from alignkit.runs.plan import Pipeline

if TYPE_CHECKING:
    from alignkit.generation.sample_files import SampleFile

Plugins = typer.Option(
    [],
    "--plugin",
    "-p",
    metavar="NAME",
    help="A stage, tuner, loss or other component to use, or a plugin: sft, qlora, ... NAME@DISTRIBUTION if two "
    "distributions provide it. Repeatable.",
)
ConfigFile = typer.Option(None, "--config", "-c", metavar="FILE", help="A YAML config file.")
Model = typer.Option(
    None, "--model", "-m", metavar="MODEL", help="The base model: a hub id or a folder. Default: the bundled model."
)
Data = typer.Option(
    [],
    "--data",
    "-d",
    metavar="DATA",
    help="The training data: a file, a folder or a hub id. Repeatable. Default: bundled data.",
)
Output = typer.Option(None, "--output", "-o", metavar="DIR", help="The folder for run folders. Default: runs.")
Trust = typer.Option(
    False,
    "--trust",
    help="Let the config file, or a run folder, run code and use servers: reward.call, judge.call, judge.base_url.",
)
Overrides = typer.Argument(
    None,
    metavar="KEY.PATH=VALUE",
    help="Settings, which override the config file. `alignkit plugins NAME` lists those of a plugin.",
)

# How answers are sampled, in `sample` and `label`.
K = typer.Option(4, "-k", min=1, help="Answers per prompt.")
MaxNewTokens = typer.Option(256, min=1, help="Maximum tokens of an answer.")
Temperature = typer.Option(1.0, min=0.0, help="Sampling temperature; 0 is greedy decoding.")
TopP = typer.Option(
    1.0, min=0.0, max=1.0, help="Nucleus sampling: sample from the most likely tokens with this total probability."
)
PromptsPerBatch = typer.Option(16, min=1, help="Prompts per batch.")


class Arguments(NamedTuple):
    """The plugins and the two sources of settings of a command."""

    registry: Registry
    file: dict[str, Any]  # the content of the config file
    cli: dict[str, Any]  # flags and key=value


def read_arguments(
    plugins: list[str],
    file: Path | None,
    model: str | None,
    data: list[str],
    output: str | None,
    overrides: list[str] | None,
) -> Arguments:
    """Read the sources of settings. ``--data`` is the data of the requested stage."""
    registry = Registry()
    from_file = dict(yaml.load(file)) if file else {}
    flags: dict[str, Any] = {"plugins": plugins, "model": model, "output": output}
    cli = merge({key: value for key, value in flags.items() if value}, *map(parse_override, overrides or []))
    if data:
        path = data[0] if len(data) == 1 else data
        cli = merge(cli, {"stages": {requested_stage(registry, from_file, cli): {"data": {"path": path}}}})
    return Arguments(registry, from_file, cli)


def print_pipeline(pipeline: Pipeline) -> None:
    """Print the finished runs that are used, a line each, and the plan of every run to train."""
    for line in plan_text.of_pipeline(pipeline):
        typer.echo(line)


def sample(samples: SampleFile) -> None:
    """Sample the answers that a file lacks."""
    from alignkit.generation import sample_files

    if samples.done:
        typer.echo(f"{samples.file} already has {samples.done} of {len(samples.prompts)} rows")
    quiet()
    sample_files.write(samples, progress)


def quiet() -> None:
    """Silence the warnings and progress bars of libraries, unless with ``--debug``. Call it before importing torch."""
    if os.environ.get("ALIGNKIT_DEBUG"):
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
