"""``alignkit plan``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from alignkit.cli import common
from alignkit.cli import fit as fit_output
from alignkit.errors import ConfigError
from alignkit.planning.fit import parse_size
from alignkit.runs.plan import pipeline

if TYPE_CHECKING:
    from alignkit.planning import Memory

Device = typer.Option(None, help="Plan for a GPU or a CPU. Default: where the run would train on this machine.")


def plan(
    overrides: list[str] = common.Overrides,
    plugin: list[str] = common.Plugins,
    config: Path = common.ConfigFile,
    model: str = common.Model,
    data: list[str] = common.Data,
    output: str = common.Output,
    trust: bool = common.Trust,
    device: Literal["cuda", "cpu"] = Device,
    as_json: bool = common.Json,
    fit: str = typer.Option(
        None, "--fit", metavar="SIZE", help="Find settings with which all runs fit into this memory, such as 12GB."
    ),
    processes: int = typer.Option(1, min=1, metavar="N", help="Plan for each of N processes, see alignkit launch."),
    time: bool = typer.Option(False, "--time", help="Measure a few steps on this machine, and estimate the time."),
) -> None:
    """Estimate the memory of a run before it starts. Takes the arguments of train and loads no weights."""
    arguments = common.read_arguments(plugin, config, model, data, output, overrides)
    limit = parse_size(fit) if fit else None
    if limit and (as_json or time):
        raise ConfigError(f"--fit cannot be combined with {'--json' if as_json else '--time'}")
    if processes > 1 and (limit or time):
        raise ConfigError(f"--processes cannot be combined with {'--fit' if limit else '--time'}")
    from alignkit import planning

    if limit:
        common.quiet()
        options: dict[str, list[Any]] = {
            "--plugin": plugin,
            "--config": [config],
            "--model": [model],
            "--data": data,
            "--output": [output],
        }
        fit_output.print_fit(
            arguments,
            fit,
            lambda each: planning.memory(each, device or "cuda", limit).peak,
            [*fit_output.words(options, overrides or []), *(["--trust"] if trust else [])],
            trust,
        )
        return
    planned = pipeline(*arguments, overwrite=True, trusted=trust)
    requested = planned.to_train[-1]
    common.quiet()
    memory = planning.memory(requested, device, processes=processes)
    measured = planning.measured_peak(requested) if processes == 1 else None
    if as_json:
        common.print_json(
            {
                "stage": requested.config.stage.component.name,
                "device": memory.device,
                "dtype": memory.dtype,
                "phases": memory.phases,
                "overhead": memory.overhead,
                "peak": memory.peak,
                "measured": None if measured is None else {"run": str(measured.run), "tensors": measured.bytes},
            }
        )
        return
    first = [run.config.stage.component.name for run in planned.to_train[:-1]]
    if first:
        typer.echo(f"{'first':>11}  {' and '.join(first)}, which need a plan of their own")
    for label, text in [*requested.describe()[:2], ("tuner", requested.config.tuner.component.name)]:
        typer.echo(f"{label:>11}  {text}")
    each = f", each of {processes} processes" if processes > 1 else ""
    typer.echo(f"{'computes':>11}  on {memory.device} in {memory.dtype}{each}")
    if (engine := requested.config.rollout) and engine.component.in_other_process:
        typer.echo(f"{'samples':>11}  in another process, by {engine.component.name}, whose memory is not counted")
    typer.echo()
    for line in table(memory):
        typer.echo(line)
    typer.echo()
    typer.echo(f"{'peak':>11}  {_gib(memory.peak)}{_overhead(memory)}")
    if measured is not None:
        typer.echo(f"{'measured':>11}  {_gib(measured.bytes)} of tensors, by {measured.run}")
    if time:
        fit_output.print_time(requested, memory.device)


def table(memory: Memory) -> Iterator[str]:
    """A row for each part, a column for each phase."""
    parts = list(dict.fromkeys(part for of_phase in memory.phases.values() for part in of_phase))
    width = max(map(len, parts)) + 2
    yield " " * width + "".join(f"{name:>16}" for name in memory.phases)
    for part in parts:
        sizes = (of_phase.get(part) for of_phase in memory.phases.values())
        yield f"{part:<{width}}" + "".join(f"{'' if size is None else _gib(size):>16}" for size in sizes)
    totals = (sum(of_phase.values()) for of_phase in memory.phases.values())
    yield f"{'together':<{width}}" + "".join(f"{_gib(total):>16}" for total in totals)


def _overhead(memory: Memory) -> str:
    if not memory.overhead:
        return ""
    return f", of which {_gib(memory.overhead)} are for CUDA and its allocator (an estimate)"


def _gib(size: Any) -> str:
    return f"{size / 2**30:.2f} GiB"
