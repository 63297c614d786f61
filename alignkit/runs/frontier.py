"""The reward-KL frontier: how the score of a policy rises with its KL to the policy that training started from.

The x axis is sqrt(KL), the distance d of "Scaling laws for reward model overoptimization" (arXiv 2210.10760): the
score by the reward that is trained on rises, and the score by a better, "gold" reward follows d (alpha - beta log d),
which falls in the end. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignkit.runs import curves, pictures
from alignkit.runs.resume import METRICS

FILE = "frontier.jsonl"  # in a run folder, written by `alignkit compare RUN --checkpoints`
PICTURES = ("frontier.svg", "frontier.png")
HELD_OUT_SCORE = "held-out score"


class Point(NamedTuple):
    """A policy at a step of training. Each error is the standard error of a mean over prompts."""

    step: int
    kl: float  # to the policy at step 0, in nats per answer
    kl_error: float | None
    score: float
    score_error: float | None
    gold: float | None  # the score by a second reward, or the win rate by a judge
    gold_error: float | None


def points(folder: Path) -> list[Point]:
    """The frontier of the run in ``folder``, in the order of steps.

    It is read from :data:`FILE` if there is one, else it is :func:`evaluated`.
    """
    if (folder / FILE).is_file():
        return sorted(_read(folder / FILE, ""), key=lambda point: point.step)
    return evaluated(folder)


def evaluated(folder: Path) -> list[Point]:
    """The evaluations on held-out prompts during the training of a run, in the order of steps. Empty without any.

    A second evaluation of a step, which is that of the average or the best policy, is left out.
    """
    if not (folder / METRICS).is_file():
        return []
    of_step: dict[int, Point] = {}
    for point in _read(folder / METRICS, "eval_"):
        of_step.setdefault(point.step, point)
    return [of_step[step] for step in sorted(of_step)]


class Labels(NamedTuple):
    """The names of ``score`` and ``gold`` of :func:`points`."""

    score: str
    gold: str | None  # None if there is no ``gold``
    rewards: list[Any] | None  # the tables of the rewards; None in files of earlier versions


def labels(folder: Path) -> Labels | None:
    """The labels in :data:`FILE`. None if there is no such file, so that the score is by the reward of training."""
    for row in curves.rows(folder / FILE) if (folder / FILE).is_file() else ():
        return Labels(str(row.get("score_by", HELD_OUT_SCORE)), row.get("gold_by"), row.get("rewards"))
    return None


def _read(file: Path, prefix: str) -> Iterator[Point]:
    for row in curves.rows(file):
        numbers = {name: _finite(row.get(f"{prefix}{name}")) for name in Point._fields[1:]}
        if numbers["kl"] is not None and numbers["score"] is not None:
            yield Point(row["step"], **numbers)  # type: ignore[arg-type]


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def draw(
    file: Path, series: Mapping[str, Sequence[Point]], label: str = HELD_OUT_SCORE, gold_label: str | None = None
) -> None:
    """Draw a curve for each run as an SVG or a PNG; needs matplotlib.

    Points with ``gold`` get a second panel below, with the same x axis. Error bars are one standard error.

    Args:
        file: the picture to write.
        series: the points of each run, by its name in the legend.
        label: what ``score`` is.
        gold_label: what ``gold`` is.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with_gold = any(point.gold is not None for of_run in series.values() for point in of_run)
    with matplotlib.rc_context(pictures.STYLE):
        figure = Figure(figsize=(6, 6.4 if with_gold else 3.8), layout="constrained")
        panels = figure.subplots(1 + with_gold, sharex=True, squeeze=False)[:, 0]
        for number, (name, of_run) in enumerate(series.items()):
            _draw(panels[0], name, f"C{number}", of_run, [(point.score, point.score_error) for point in of_run])
            if with_gold:
                judged = [point for point in of_run if point.gold is not None]
                _draw(panels[1], name, f"C{number}", judged, [(point.gold, point.gold_error) for point in judged])
        for axes, text in zip(panels, (label, gold_label or "gold reward"), strict=False):
            axes.set_ylabel(text)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        panels[-1].set_xlabel("square root of the KL to the start of the run (nats per answer)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
        pictures.save(figure, file)


def _draw(axes: Any, name: str, color: str, of_run: Sequence[Point], values: Sequence[tuple[Any, Any]]) -> None:
    """One curve, with the step beside each point."""
    if not of_run:
        return
    distances = [_distance(point.kl) for point in of_run]
    errors = [(point.kl, point.kl_error or 0) for point in of_run]
    axes.errorbar(
        distances,
        [value for value, _ in values],
        yerr=[error or 0 for _, error in values],
        xerr=[
            [_distance(kl) - _distance(kl - error) for kl, error in errors],
            [_distance(kl + error) - _distance(kl) for kl, error in errors],
        ],
        fmt="o-",
        color=color,
        markersize=4,
        linewidth=1,
        elinewidth=0.8,
        capsize=2,
        label=name,
    )
    beside = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 7, "color": color}
    for point, distance, (value, _) in zip(of_run, distances, values, strict=True):
        axes.annotate(str(point.step), (distance, value), **beside)


def _distance(kl: float) -> float:
    """The square root of the KL. An estimate of a small KL from samples can be negative; it counts as 0."""
    return math.sqrt(max(kl, 0.0))
