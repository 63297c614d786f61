"""``alignkit sweep``."""

from __future__ import annotations

from pathlib import Path

import typer

from alignkit import paths
from alignkit.cli import common, tables
from alignkit.cli.stopping import on_sigterm
from alignkit.config import grid
from alignkit.evaluation import sweep_results
from alignkit.runs import pictures, sweep_training
from alignkit.runs.sweep import FILE, Job, Sweep
from alignkit.runs.sweep import plan as plan_sweep

FAILED = 1  # exit status if a run failed


def sweep(
    overrides: list[str] = typer.Argument(
        metavar="KEY.PATH=VALUE[,VALUE...]",
        help="Settings, as for `train`. Commas separate several values of a setting, except inside brackets, braces "
        "or quotes.",
    ),
    plugin: list[str] = common.Plugins,
    config: Path = common.ConfigFile,
    model: str = common.Model,
    data: list[str] = common.Data,
    output: str = typer.Option(
        None,
        "--output",
        "-o",
        metavar="DIR",
        help="The folder of the sweep. Default: runs/sweep, or sweep in the config's output.",
    ),
    trust: bool = common.Trust,
    plan_only: bool = typer.Option(False, "--plan", help="Check the settings, print the runs and exit."),
    quiet: bool = common.Quiet,
) -> None:
    """Train a run for every combination of settings. Continues where an earlier sweep in the same folder stopped.

    Example: alignkit sweep --plugin ppo ppo.kl_coef=0.02,0.05,0.1 train.seed=1,2,3
    """
    settings = grid.parse(overrides)
    arguments = common.read_arguments(plugin, config, model, data, output, settings.fixed)
    folder = paths.expand(arguments.cli.get("output") or Path(arguments.file.get("output") or "runs") / "sweep")
    stoppable = on_sigterm("To continue, run the same command again")
    with stoppable, common.only_result(quiet and not plan_only):
        planned = plan_sweep(arguments.file, arguments.cli, settings, folder, trust)
        _print_plan(planned, settings)
        if plan_only:
            return
        try:
            sweep_training.train(planned, typer.echo, lambda job: _report(planned, job))
        except sweep_training.StoppedError:
            typer.echo("\nstopped. To continue, run the same command again", err=True)
            raise typer.Exit(130) from None
    _print_results(planned)
    if failed := [job for job in [*planned.parents, *planned.jobs] if job.state == "failed"]:
        typer.echo(f"\n{len(failed)} of {len(planned.parents) + len(planned.jobs)} runs failed:", err=True)
        for job in failed:
            typer.echo(f"  {job.name}: {job.error}", err=True)
        typer.echo("To try them again, run the same command again", err=True)
        raise typer.Exit(FAILED)


def _print_plan(planned: Sweep, settings: grid.Grid) -> None:
    values = ", ".join(f"{key} = {' | '.join(each)}" for key, each in settings.varied.items())
    typer.echo(f"{len(planned.jobs)} runs of {planned.stage} in {planned.output}: {values}")
    for job in planned.parents:
        typer.echo(f"{'first':>9}  {job.folder}")
    for job in planned.jobs:
        typer.echo(f"{'finished' if job.is_finished else 'to train':>9}  {job.folder}")


def _report(planned: Sweep, job: Job) -> None:
    """Print that a run begins to train, or has ended."""
    if job.state == "training":
        place = f" ({planned.jobs.index(job) + 1} of {len(planned.jobs)})" if job in planned.jobs else ""
        typer.echo(f"\ntraining {job.folder}{place}; output in {job.log}")
    elif job.error:
        typer.echo(f"failed: {job.error}")
    else:
        typer.echo(f"done in {job.seconds:.0f} s")


def _print_results(planned: Sweep) -> None:
    """Print the table, and draw the picture."""
    groups = sweep_results.groups_of(planned.jobs)
    finished = [job for job in planned.jobs if job.state == "finished"]
    if not finished:
        return
    metrics = sweep_results.metrics_of(groups, finished[0].config.stage.component.watch)
    rows = []
    for group in groups:
        means = [sweep_results.mean_of(group, metric) for metric in metrics]
        cells = [tables.with_error(mean, name, "{:.3g}") for mean, name in zip(means, metrics, strict=True)]
        rows.append([group.name, str(len(group.rows)), *cells])
    typer.echo()
    tables.show(["settings", "runs", *(f"held-out {metric}" for metric in metrics)], rows)
    over = "seeds" if groups[0].over_seeds else "held-out rows"
    typer.echo(f"errors are standard errors over {over}")
    written = [FILE]
    if pictures.can_draw():
        sweep_results.draw(planned.output, groups, metrics)
        written += sweep_results.PICTURES
    else:
        typer.echo("the picture needs matplotlib, which is not installed: pip install 'alignkit[plot]'")
    typer.echo(f"written to {planned.output}: {', '.join(written)}")
