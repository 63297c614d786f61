"""``alignkit label``."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import typer

from alignkit.cli import common
from alignkit.data.sources import READERS
from alignkit.errors import ConfigError
from alignkit.labeling import binding, export, items, report

EXTRA = {"starlette": "starlette", "uvicorn": "uvicorn", "markdown_it": "markdown-it-py", "nh3": "nh3"}
SAMPLING = {"prompts": "--prompts", "output": "--output", "k": "-k", "max_new_tokens": "--max-new-tokens"}
SAMPLING |= {"temperature": "--temperature", "top_p": "--top-p", "batch": "--batch"}
BOUND = ("guide", "scale", "flags", "overlap", "seed")  # what a store was begun with


def label(
    context: typer.Context,
    samples: str = typer.Argument(
        metavar="FILE_OR_RUN", help="Rows as `alignkit sample` writes them, or a run or model to sample from."
    ),
    prompts: str = typer.Option(
        None, "--prompts", metavar="DATA", help="With a run: rows with prompts, in any data format."
    ),
    output: Path = typer.Option(
        Path("samples.jsonl"), "--output", "-o", metavar="FILE", help="With a run: the file for the samples."
    ),
    k: int = common.K,
    max_new_tokens: int = common.MaxNewTokens,
    temperature: float = common.Temperature,
    top_p: float = common.TopP,
    batch: int = common.PromptsPerBatch,
    labeler: str = typer.Option(None, metavar="NAME", help="The name of the labeler. Default: the page asks."),
    guide: Path = typer.Option(None, metavar="FILE", help="Instructions in Markdown, shown beside the answers."),
    scale: int = typer.Option(7, min=2, max=10, help="Grades are 1 to this number."),
    no_grades: bool = typer.Option(False, "--no-grades", help="Rank only, without grades."),
    flags: str = typer.Option(
        None, metavar="A,B,...", help="Flags to tick for an answer. Default: InstructGPT's. '' is none."
    ),
    overlap: float = typer.Option(0.1, min=0.0, max=1.0, help="The share of rows that every labeler gets."),
    seed: int = typer.Option(0, help="Random seed of sampling, of the overlap and of the order of answers."),
    markdown: bool = typer.Option(False, "--markdown", help="Show answers as Markdown. Default: plain text."),
    host: str = typer.Option("127.0.0.1", metavar="ADDRESS", help="The address to listen on."),
    port: int = typer.Option(None, min=1, max=65535, help="The port to listen on. Default: a free one."),
    no_browser: bool = typer.Option(False, "--no-browser", help="Do not open a browser."),
    export_to: Path = typer.Option(None, "--export", metavar="FILE", help="Write the rankings to a file, and exit."),
    merge: str = typer.Option(
        "mean",
        metavar="mean|apart",
        help="With --export: merge the rankings of a row by mean rank, or keep each.",
    ),
    status: bool = typer.Option(False, "--status", help="Print progress and agreement, and exit."),
    as_json: bool = typer.Option(False, "--json", help="With --status: print JSON."),
) -> None:
    """Rank answers in a browser. Several people can label at once; what they submit is kept beside the samples."""
    named = {name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"}  # type: ignore[union-attr]
    if merge not in export.MERGES:
        raise ConfigError(f"--merge {merge}: known are {', '.join(export.MERGES)}")
    is_file = Path(samples).suffix in READERS or Path(samples).is_file()
    if is_file and (unused := [option for name, option in SAMPLING.items() if name in named]):
        raise ConfigError(f"{unused[0]} has no effect: {samples} has its answers already")
    if status or export_to:
        if not is_file:
            raise ConfigError("--status and --export need the file of samples, not a run")
        _print_status(Path(samples), as_json) if status else _export(Path(samples), export_to, merge)
        return
    if missing := [name for module, name in EXTRA.items() if importlib.util.find_spec(module) is None]:
        raise ConfigError(f"label needs {missing[0]}, which is not installed: pip install 'alignkit[label]'")
    given: dict[str, Any] = {name: context.params[name] for name in BOUND if name in named}
    if guide:
        given["guide"] = _read(guide)
    if flags is not None:
        given["flags"] = [flag.strip() for flag in flags.split(",") if flag.strip()]
    if no_grades:
        given["scale"] = None
    if is_file:
        file = Path(samples)
    else:
        if prompts is None:
            raise ConfigError(f"label {samples} needs --prompts DATA to sample from, or name a file of samples")
        file = _sample(samples, prompts, output, k, batch, max_new_tokens, temperature, top_p, seed)
    from alignkit.labeling import serve
    from alignkit.labeling.store import Store

    database, settings = binding.bind(file, given, typer.echo)
    store = Store(items.store_file(file), database, settings)
    show = not no_browser and sys.stdout.isatty() and _has_display()
    serve.serve(file, store, host, port, labeler, markdown, typer.echo, show)
    store.close()


def _sample(run: str, prompts: str, output: Path, k: int, batch: int, *sampling: Any) -> Path:
    from alignkit.generation import sample_files

    if k < 2:
        raise ConfigError("-k must be at least 2: there is nothing to rank in one answer")
    samples = sample_files.plan(run, prompts, output, k, batch)
    if samples.done < len(samples.prompts):
        common.sample(samples, *sampling)
    return output


def _read(guide: Path) -> str:
    try:
        return guide.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"--guide: no file {guide}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--guide {guide}: not UTF-8") from None


def _has_display() -> bool:
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _export(samples: Path, output: Path, merge: str) -> None:
    count, tied = export.write(samples, output, merge)
    typer.echo(f"wrote {count} rankings to {output}" + (f" ({tied} of them tie all answers)" if tied else ""))


def _print_status(samples: Path, as_json: bool) -> None:
    content = report.report(samples)
    typer.echo(json.dumps(content, indent=2) if as_json else "\n".join(_lines(content)))


def _lines(content: dict[str, Any]) -> list[str]:
    lines = [f"{content['done']} of {content['items']} rows labeled, {content['to_do']} to do"]
    for each in content["labelers"]:
        lines.append(f"{each['labeler']}: {each['done']} labeled, {each['skipped']} skipped")
    if agreed := content["agreement"]:
        lines.append(f"agreement: {agreed['share']:.1%}")
    return lines
