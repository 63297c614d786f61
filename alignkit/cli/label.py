"""``alignkit label``."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from alignkit import paths
from alignkit.api import limits
from alignkit.cli import common
from alignkit.data import outputs
from alignkit.data.readers import kind_of
from alignkit.errors import ConfigError
from alignkit.labeling import binding, export, items, labels, report

EXTRA = {"starlette": "starlette", "uvicorn": "uvicorn", "markdown_it": "markdown-it-py", "nh3": "nh3"}
SAMPLING = {"prompts", "output", "k", "max_new_tokens", "temperature", "top_p", "batch"}
INSTRUCTGPT = "InstructGPT's labelers: 72.6% ± 1.5% (arXiv 2203.02155)"


def label(
    context: typer.Context,
    samples: str = typer.Argument(
        metavar="FILE_OR_RUN", help="Rows as `alignkit sample` writes them, or a run or model to sample from."
    ),
    prompts: str = typer.Option(None, "--prompts", metavar="DATA", help="For a run: rows with prompts, in any format."),
    output: Path = typer.Option(
        Path("samples.jsonl"),
        "--output",
        "-o",
        parser=paths.expand,
        metavar="FILE",
        help="For a run: the file for the samples.",
    ),
    k: int = common.K,
    max_new_tokens: int = common.MaxNewTokens,
    temperature: float = common.Temperature,
    top_p: float = common.TopP,
    batch: int = common.PromptsPerBatch,
    labeler: str = typer.Option(None, metavar="NAME", help="The labeler's name. Default: the page asks for it."),
    guide: Path = typer.Option(
        None, parser=paths.expand, metavar="FILE", help="Instructions in Markdown, shown beside the answers."
    ),
    scale: int = typer.Option(7, min=2, max=10, help="Grades are from 1 to this number."),
    no_grades: bool = typer.Option(False, "--no-grades", help="Rank only, without grades."),
    flags: str = typer.Option(
        None, metavar="A,B,...", help="The flags of an answer; '' for none. Default: InstructGPT's."
    ),
    overlap: float = typer.Option(0.1, min=0.0, max=1.0, help="The share of rows that every labeler gets."),
    seed: int = typer.Option(
        0, min=0, max=limits.LARGEST_SEED, help="Random seed of samples, overlap and the order of answers."
    ),
    markdown: bool = typer.Option(False, "--markdown", help="Show answers as Markdown. Default: plain text."),
    host: str = typer.Option("127.0.0.1", metavar="ADDRESS", help="The address to listen on."),
    port: int = typer.Option(None, min=1, max=65535, help="The port to listen on. Default: a free one."),
    no_browser: bool = typer.Option(False, "--no-browser", help="Do not open a browser."),
    export_file: Path = typer.Option(
        None, "--export", parser=paths.expand, metavar="FILE", help="Write the rankings to a file, and exit."
    ),
    merge: str = typer.Option(
        "mean", metavar="mean|apart", help="With --export: one ranking per row, by mean rank, or one per labeler."
    ),
    status: bool = typer.Option(False, "--status", help="Print progress and agreement, and exit."),
    as_json: bool = typer.Option(False, "--json", help="With --status: print JSON."),
) -> None:
    """Rank answers in a browser. Several people can label at once. Their labels are stored next to the file.

    Example: alignkit label samples.jsonl --guide GUIDE.md
    """
    file = paths.expand(samples)
    is_file = kind_of(file) is not None or file.is_file()
    if status or export_file:
        used = {"samples", "status", "as_json"} if status else {"samples", "export_file", "merge"}
        _refuse(context, dict.fromkeys(set(context.params) - used, f"with {'--status' if status else '--export'}"))
        if not is_file:
            raise ConfigError(f"--status and --export need the file of samples, and {samples} is not a data file")
        _print_status(file, as_json) if status else _export(file, export_file, merge)
        return
    unused = {"as_json": "without --status", "merge": "without --export"}
    unused |= dict.fromkeys(SAMPLING, "with a file of samples") if is_file else {}
    unused |= {"scale": "with --no-grades"} if no_grades else {}
    _refuse(context, unused)
    if missing := [name for module, name in EXTRA.items() if importlib.util.find_spec(module) is None]:
        raise ConfigError(f"label needs {missing[0]}, which is not installed: pip install 'alignkit[label]'")
    given = _settings(context, guide, flags, no_grades)
    name = _name(labeler) if labeler is not None else None
    from alignkit.labeling import serve
    from alignkit.labeling.store import Store

    serve.listen(host, port or 0).close()  # fails before answers are sampled and a store is begun
    if not is_file:
        file = _sample(samples, prompts, output, k, batch, max_new_tokens, temperature, top_p, seed)
    store = Store(*binding.bind(file, given, typer.echo))
    if host not in serve.LOOPBACK:
        typer.echo("warning: other machines can open the page, and what is sent is not encrypted", err=True)
    open_browser = not no_browser and sys.stdout.isatty() and _has_display()
    try:
        fixed = store.spelled(name) if name is not None else None
        serve.serve(file, store, host, port, fixed, markdown, typer.echo, open_browser)
    finally:
        store.close()
    typer.echo(f"the labels are in {items.store_file(file)}. Write them: alignkit label {file} --export rankings.jsonl")


def _named(context: typer.Context) -> set[str]:
    """The parameters that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _refuse(context: typer.Context, unused: Mapping[str, str]) -> None:
    """Refuse options that have no effect. ``unused`` says beside, or without, which other option."""
    for parameter in context.command.params:
        if parameter.name in _named(context) & set(unused):
            raise ConfigError(f"label: {parameter.opts[0]} has no effect {unused[parameter.name]}")


def _settings(context: typer.Context, guide: Path | None, flags: str | None, no_grades: bool) -> dict[str, Any]:
    """The settings that the user named. A store that is there already has the others."""
    named = _named(context) & {"scale", "overlap", "seed"}
    given: dict[str, Any] = {name: context.params[name] for name in sorted(named)}
    if guide is not None:
        given["guide"] = _read(guide)
    if flags is not None:
        given["flags"] = list(dict.fromkeys(flag.strip() for flag in flags.split(",") if flag.strip()))
    if no_grades:
        given["scale"] = None
    return given


def _name(labeler: str) -> str:
    try:
        return labels.labeler_name(labeler)
    except labels.InvalidLabelError as error:
        raise ConfigError(f"--labeler: {error}") from None


def _read(guide: Path) -> str:
    try:
        return guide.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"--guide {guide}: not UTF-8") from None
    except OSError as error:
        raise ConfigError(f"--guide {guide}: {error.strerror}") from None


def _sample(run: str, prompts: str | None, output: Path, k: int, batch: int, *sampling: Any) -> Path:
    """Sample answers to label, and leave the accelerator to others."""
    if prompts is None:
        raise ConfigError(f"label {run}: name the prompts to sample answers to with --prompts, or a file of samples")
    if k < 2:
        raise ConfigError("label: -k must be at least 2, because one answer cannot be ranked")
    from alignkit.generation import sample_files

    planned = sample_files.plan(run, prompts, output, k, batch, sample_files.Settings(*sampling))
    if planned.done < len(planned.prompts):
        common.sample(planned)
        import torch

        torch.cuda.empty_cache()
    return output


def _has_display() -> bool:
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _export(samples: Path, output: Path, merge: str) -> None:
    if merge not in export.MERGES:
        raise ConfigError(f"--merge: '{merge}' is not {' or '.join(export.MERGES)}")
    outputs.check_rows("--export", output, samples)
    binding.check_rows(samples)
    count, tied = export.write(samples, output, merge)
    typer.echo(f"wrote {count} rankings to {output}" + (f" ({tied} of them tie all answers)" if tied else ""))


def _print_status(samples: Path, as_json: bool) -> None:
    binding.check_rows(samples)
    content = report.report(samples)
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False) if as_json else "\n".join(_lines(content)))


def _lines(content: dict[str, Any]) -> list[str]:
    skipped = f" ({content['skipped']} of them skipped)" if content["skipped"] else ""
    lines = [f"{content['done']} of {content['items']} rows labeled, {content['to_do']} to do{skipped}"]
    for each in content["labelers"]:
        seconds = each["seconds_per_item"]
        pace = f", {seconds:.0f} seconds per row (median)" if seconds is not None else ""
        lines.append(f"{each['labeler']}: {each['done']} labeled, {each['skipped']} skipped{pace}")
    agreed = content["agreement"]
    if agreed is None:
        return [*lines, "agreement: unknown, because no two labelers have ordered the same two answers"]
    error = f" ± {agreed['error']:.1%}" if agreed["error"] is not None else ""
    alpha = f"{agreed['alpha']:.2f}" if agreed["alpha"] is not None else "unknown"
    return [
        *lines,
        f"agreement: {agreed['share']:.1%}{error} of {agreed['pairs']} pairs in {agreed['items']} rows. {INSTRUCTGPT}",
        f"Krippendorff's alpha (ordinal, of preferences between two answers): {alpha}",
    ]
