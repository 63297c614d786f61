"""The output of ``alignkit plan --fit`` and ``--time``."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable, Mapping, Sequence

import typer

from alignkit.cli.common import Arguments
from alignkit.errors import AlignkitError
from alignkit.planning import calibration, fit
from alignkit.runs.plan import Plan

CHANGES = {
    fit.NONE: "these settings change no result:",
    fit.OPTIMIZER: "these change the arithmetic of the optimizer:",
    fit.RESULT: "these change the result:",
}


def print_fit(
    arguments: Arguments, size: str, peak: Callable[[Plan], int], command: Sequence[str], trusted: bool
) -> None:
    """Print the settings with which the runs of a command fit into ``size``, and the ``command`` with them.

    Raises:
        AlignkitError: the command is not valid, or no settings fit.
    """
    limit = fit.parse_size(size)
    found = fit.fit(*arguments, limit, peak, trusted)
    for stage, of_stage in found.peaks.items():
        typer.echo(f"{'peak':>11}  {of_stage / fit.GIB:.2f} GiB in {stage}; {size} is {limit / fit.GIB:.2f} GiB")
    for changes, settings in itertools.groupby(found.settings, key=lambda setting: setting.changes):
        typer.echo(f"\n{CHANGES[changes]}")
        for setting in settings:
            typer.echo(f"  {setting.override:<44}  {setting.help}")
    changed = [setting.override for setting in found.settings]
    keys = [f"{override.partition('=')[0]}=" for override in changed]
    kept = [word for word in command if not word.startswith(tuple(keys))]
    typer.echo(f"\n{'' if changed else 'it fits as it is: '}{shlex.join(['alignkit', 'train', *kept, *changed])}")


def words(options: Mapping[str, Sequence[object]], overrides: Sequence[str]) -> list[str]:
    """The arguments of a training command. ``options`` are flags with their values, without those that are None."""
    given = ((flag, str(value)) for flag, values in options.items() for value in values if value)
    return [*itertools.chain(*given), *overrides]


def print_time(plan: Plan, device: str) -> None:
    """Measure a few steps of a run on this machine, and print how long the whole run takes on ``device``."""
    try:
        measured = calibration.calibrate(plan, device)
    except AlignkitError as error:
        typer.echo(f"{'time':>11}  not measured: {error}")
        return
    typer.echo(f"{'time':>11}  {_between(measured.total)} on {measured.device}, from two microbatches")
    for part, seconds in measured.parts.items():
        typer.echo(f"{'':>11}  {part}: {_between(seconds)}")


def _between(seconds: calibration.Seconds) -> str:
    low, high = (_duration(each) for each in seconds)
    return low if low == high else f"{low} to {high}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
