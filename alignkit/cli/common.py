"""Options and output that several commands share."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from alignkit import paths, yaml
from alignkit.api import limits
from alignkit.cli import completion
from alignkit.config.resolve import parse_override, requested_stage
from alignkit.config.settings import merge
from alignkit.errors import ConfigError
from alignkit.lazy import without_collections
from alignkit.progress import progress as progress
from alignkit.progress import without_progress
from alignkit.registry import Registry
from alignkit.runs import base, manifest, plan_text
from alignkit.runs.plan import Pipeline

if TYPE_CHECKING:
    from alignkit.generation.sample_files import SampleFile

Plugins = typer.Option(
    [],
    "--plugin",
    "-p",
    metavar="NAME",
    autocompletion=completion.plugin_names,
    help="A stage, tuner, loss or other component to use, or a plugin: sft, qlora, ... NAME@DISTRIBUTION if two "
    "distributions provide it. Repeatable.",
)
ConfigFile = typer.Option(None, "--config", "-c", parser=paths.expand, metavar="FILE", help="A YAML config file.")
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
Output = typer.Option(
    None,
    "--output",
    "-o",
    metavar="DIR",
    help="The output folder. Each stage writes a subfolder, such as runs/sft. Default: runs.",
)
Trust = typer.Option(
    False,
    "--trust",
    help="Let the config file, or a run folder, run code and use servers: reward.call, judge.call, judge.base_url, "
    "rollout.urls.",
)
ModelKwargs = typer.Argument(
    None, metavar="model_kwargs.KEY=VALUE", help="Arguments of from_pretrained for a model that is not a run."
)
Overrides = typer.Argument(
    None,
    metavar="KEY.PATH=VALUE",
    help="Settings, which override the config file. `alignkit plugins NAME` lists those of a plugin.",
)

# What a command prints: see `only_result`.
Quiet = typer.Option(False, "--quiet", "-q", help="Print only warnings, errors and the result.")
Json = typer.Option(
    False, "--json", help="Print the result as JSON on standard output, and everything else on standard error."
)

# How answers are sampled, in `sample` and `label`.
K = typer.Option(4, "-k", min=1, help="Answers per prompt.")
MaxNewTokens = typer.Option(256, min=1, help="Maximum tokens of an answer.")
Temperature = typer.Option(1.0, min=0.0, help="Sampling temperature; 0 is greedy decoding.")
TopP = typer.Option(
    1.0, min=0.01, max=1.0, help="Nucleus sampling: sample from the most likely tokens with this total probability."
)
Seed = typer.Option(0, min=0, max=limits.LARGEST_SEED, help="Random seed; the same seed gives the same answers.")
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
    trusted = {"model_kwargs": {"trust_remote_code": True}} if os.environ.get(base.TRUST) else {}
    cli = merge(trusted, {key: value for key, value in flags.items() if value}, *map(parse_override, overrides or []))
    if data:
        path = data[0] if len(data) == 1 else data
        cli = merge(cli, {"stages": {requested_stage(registry, from_file, cli): {"data": {"path": path}}}})
    return Arguments(registry, from_file, cli)


def model_kwargs_of(name: str, overrides: list[str] | None) -> dict[str, Any]:
    """``model_kwargs.KEY=VALUE`` of a command that loads the model ``name``, with ``--trust-remote-code``.

    Raises:
        ConfigError: another key, or a run, which is loaded as it was trained.
    """
    settings = merge(*map(parse_override, overrides or []))
    if wrong := [key for key in settings if key != "model_kwargs"]:
        raise ConfigError(f"unknown key {wrong[0]}: the settings here are model_kwargs.KEY=VALUE")
    return base.check_kwargs(name, settings.get("model_kwargs", {}))


def print_pipeline(pipeline: Pipeline) -> None:
    """Print the finished runs that are used, a line each, and the plan of every run to train."""
    for line in plan_text.of_pipeline(pipeline):
        typer.echo(line)


def pipeline_json(pipeline: Pipeline) -> dict[str, Any]:
    """A pipeline for ``--json``: the runs that exist, and those to train, in order."""
    planned = [
        {
            "stage": plan.config.stage.component.name,
            "folder": str(plan.config.folder),
            "train_rows": None if plan.stream else len(plan.train_rows),
            "eval_rows": len(plan.eval_rows),
            "config": plan.config.to_dict(),
        }
        for plan in pipeline.to_train
    ]
    return {"finished": [str(run.folder) for run in pipeline.finished], "to_train": planned}


def sample(samples: SampleFile) -> None:
    """Sample the answers that a file lacks."""
    from alignkit.generation import sample_files

    if samples.done:
        typer.echo(f"{samples.file} already has {samples.done} of {len(samples.prompts)} rows")
    quiet()
    sample_files.write(samples, progress)


class _OnlyWarnings(io.TextIOBase):
    """Writes lines that begin with "warning" to standard error, and no others."""

    def __init__(self) -> None:
        self.line = ""

    def write(self, text: str) -> int:
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            if line.lower().startswith("warning"):
                print(line, file=sys.stderr)
        return len(text)


@contextlib.contextmanager
def only_result(quiet: bool, as_json: bool = False) -> Iterator[None]:
    """What is printed meanwhile is not the result of the command.

    With ``quiet`` only its warnings are shown. With ``as_json`` it goes to standard error, so that standard output is
    one JSON value.
    """
    with contextlib.ExitStack() as stack:
        if quiet:
            for bars in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
                os.environ.setdefault(bars, "1")
            stack.enter_context(contextlib.redirect_stdout(_OnlyWarnings()))
            stack.enter_context(without_progress())
        elif as_json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def print_json(result: Any) -> None:
    """Print a result as JSON, with null in place of NaN and infinity."""
    typer.echo(json.dumps(manifest.plain_json(result), indent=2, ensure_ascii=False))


def quiet() -> None:
    """Silence the warnings and progress bars of libraries, unless with ``--debug``. Call it before importing torch."""
    if os.environ.get("ALIGNKIT_DEBUG"):
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # each process of DDP would warn
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with without_collections():
        import datasets
        import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
