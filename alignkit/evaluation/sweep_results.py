"""The results of a sweep: means and standard errors over seeds, and the picture. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignkit.config import grid
from alignkit.evaluation.error_bars import error_bar
from alignkit.runs import frontier, pictures
from alignkit.runs.frontier import Point
from alignkit.runs.sweep import Job

PICTURES = ("sweep.svg", "sweep.png")


class Group(NamedTuple):
    """The finished runs of a sweep that differ in their seeds only."""

    name: str  # their settings, such as ``kl_coef=0.02``
    over_seeds: bool  # whether the sweep varies the seed
    jobs: list[Job]
    rows: list[dict[str, Any]]  # of these in ``sweep.jsonl``


def groups_of(jobs: Sequence[Job]) -> list[Group]:
    """The groups of a sweep, in the order of their first runs. A group may have no finished run."""
    groups: dict[str, Group] = {}
    for job in jobs:
        own = {key: value for key, value in job.settings.items() if not grid.is_seed(key)}
        name = grid.label_of(own, list(job.settings)) or "all seeds"
        group = groups.setdefault(name, Group(name, len(own) < len(job.settings), [], []))
        if job.state == "finished":
            group.jobs.append(job)
            group.rows.append(job.row())
    return list(groups.values())


def metrics_of(groups: Sequence[Group], watch: Sequence[str]) -> list[str]:
    """The held-out metrics to show: the loss and those that the stage prints, as far as the runs have them."""
    rows = [row for group in groups for row in group.rows]
    return [name for name in ("loss", *watch) if any(f"eval_{name}" in row["metrics"] for row in rows)]


def mean_of(group: Group, metric: str) -> dict[str, float | None]:
    """The mean of a held-out metric over the runs of a group, as ``metric``, and its standard error over seeds.

    If the sweep does not vary the seed, a group is one run, and the error is that of the run, over held-out rows. Both
    are None unless all runs of the group have the metric: a mean without those where it is not finite would be biased.
    """
    name, error = f"eval_{metric}", f"{metric}_error"
    values = [row["metrics"].get(name) for row in group.rows]
    if not values or None in values:
        return {metric: None, error: None}
    if not group.over_seeds:
        return {metric: values[0], error: group.rows[0]["metrics"].get(f"{name}_error")}
    mean, error_over_seeds = _mean(values)
    return {metric: mean, error: error_over_seeds}


def frontier_of(group: Group) -> list[Point]:
    """The reward-KL frontier of a group: means over its runs at each step that all of them have evaluated.

    Not from ``frontier.jsonl``, which ``alignkit compare --checkpoints`` writes for some runs, by any reward.
    """
    if not group.jobs:
        return []
    if not group.over_seeds:
        return frontier.evaluated(group.jobs[0].folder)
    of_runs = [{point.step: point for point in frontier.evaluated(job.folder)} for job in group.jobs]
    averaged = []
    for step in sorted(set.intersection(*map(set, of_runs))):
        kl, kl_error = _mean([run[step].kl for run in of_runs])
        score, score_error = _mean([run[step].score for run in of_runs])
        averaged.append(Point(step, kl, kl_error, score, score_error, None, None))
    return averaged


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    return sum(values) / len(values), error_bar("error", values).get("error")


def draw(folder: Path, groups: Sequence[Group], metrics: Sequence[str]) -> None:
    """Draw the sweep: the frontier of each group, or for stages without one the first metric. Needs matplotlib."""
    series = {group.name: points for group in groups if (points := frontier_of(group))}
    for name in PICTURES:
        if series:
            frontier.draw(folder / name, series)
        elif metrics:
            _draw_metric(folder / name, groups, metrics[0])


def _draw_metric(file: Path, groups: Sequence[Group], metric: str) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    means = {group.name: mean for group in groups if (mean := mean_of(group, metric))[metric] is not None}
    with matplotlib.rc_context(pictures.STYLE):
        figure = Figure(figsize=(6, 1.2 + 0.35 * len(means)), layout="constrained")
        axes = figure.add_subplot()
        errors = [mean[f"{metric}_error"] or 0 for mean in means.values()]
        values: Any = [mean[metric] for mean in means.values()]
        axes.errorbar(values, list(means), xerr=errors, fmt="o", capsize=3)
        axes.invert_yaxis()
        axes.set_xlabel(f"held-out {metric}")
        axes.grid(alpha=0.3)
        pictures.save(figure, file)
