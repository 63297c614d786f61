"""The panels of the page: which curves are drawn together. Without matplotlib, they have numbers and no pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from alignkit.reporting import numbers, pictures
from alignkit.reporting.folders import ReportedRun
from alignkit.reporting.numbers import Measured
from alignkit.reporting.pictures import Dot, Series
from alignkit.runs import curves, frontier, record
from alignkit.runs.curves import Curve
from alignkit.runs.frontier import Point

PANELS = 12  # of a stage
WITHOUT = ("learning_rate", "kl_coef")  # drawn last: settings rather than results


class Panel(NamedTuple):
    """A picture with a title and the last number of each of its curves."""

    title: str
    picture: Markup | None  # None without matplotlib
    last: str = ""


class StageCurves(NamedTuple):
    """The curves of all runs of a stage, a panel for each metric."""

    stage: str
    summary: str
    runs: list[ReportedRun]  # in the order of the series
    panels: list[Panel]
    left_out: list[str]  # metrics beyond PANELS


def stage_curves(runs: Sequence[ReportedRun]) -> list[StageCurves]:
    """The curves of each stage, in the order of the runs."""
    of_stage: dict[str, list[ReportedRun]] = {}
    for run in runs:
        of_stage.setdefault(run.stage, []).append(run)
    return [_of_stage(stage, of_runs) for stage, of_runs in of_stage.items()]


def _of_stage(stage: str, runs: list[ReportedRun]) -> StageCurves:
    drawn = [run for run in runs if run.curves]
    by_metric: dict[str, dict[int, Curve]] = {}
    for number, run in enumerate(drawn):
        for curve in run.curves:
            by_metric.setdefault(curve.name, {})[number] = curve
    names = sorted(by_metric, key=lambda name: name in WITHOUT)
    panels = [_panel(stage, name, by_metric[name]) for name in names[:PANELS]]
    declared = next((run.declared for run in runs if run.declared), None)
    return StageCurves(stage, declared.summary if declared else "", drawn, panels, names[PANELS:])


def _panel(stage: str, metric: str, of_runs: Mapping[int, Curve]) -> Panel:
    series = list[Series]()
    for number, curve in of_runs.items():
        if curve.train:
            series.append(Series("training", [Dot(p.step, p.value) for p in curve.train], number))
        if curve.held_out:
            dots = [Dot(p.step, p.value, p.error) for p in curve.held_out]
            series.append(Series("held out", dots, number, "points"))
    title = numbers.label(metric)
    last = _last(metric, next(iter(of_runs.values()))) if len(of_runs) == 1 else ""
    label = f"{stage}: {title} over the steps of training. {last}"
    return Panel(title, _drawn(series, label, percent=numbers.is_probability(metric)), last)


def _last(metric: str, curve: Curve) -> str:
    point = (curve.held_out or curve.train)[-1]
    return numbers.text(Measured(point.value, point.error), numbers.is_probability(metric))


def _drawn(series: Sequence[Series], label: str, *arguments: Any, **options: Any) -> Markup | None:
    return pictures.draw(series, label, *arguments, **options) if curves.can_draw() else None


# --- the reward model ------------------------------------------------------------------------------------------------


class Distance(NamedTuple):
    """The accuracy of a reward model on pairs of answers that are this far apart in the ranking."""

    distance: str
    pairs: int | None
    accuracy: Measured


class Calibration(NamedTuple):
    """The accuracy of a reward model on held-out pairs of answers."""

    by_distance: list[Distance]
    panels: list[Panel]
    note: str = ""  # what is missing


def calibration(run: ReportedRun) -> Calibration:
    """The accuracy of a reward model by distance in rank, and its calibration, from ``pairs.json``.

    Raises:
        KeyError, TypeError, ValueError, ...: the file is not as alignkit writes it.
    """
    file = run.folder / "pairs.json"
    if not file.exists():
        return _without_pairs(run)
    content = record.loads(file.read_text(encoding="utf-8"))
    by_distance = [
        Distance(str(each["distance"]), int(each["pairs"]), _measured(each["accuracy"], each["error"]))
        for each in content["by_distance"]
    ]
    bins = [(float(each["predicted"]), _measured(each["observed"], each["error"])) for each in content["calibration"]]
    panels, options = list[Panel](), {"limits": (0, 1.05), "percent": True}
    if by_distance:
        accuracy = [Dot(int(each.distance), *each.accuracy) for each in by_distance]
        chance = [Dot(accuracy[0].x - 0.2, 0.5), Dot(accuracy[-1].x + 0.2, 0.5)]
        series = [Series("chance", chance, 7), Series("accuracy", accuracy, 0, "points")]
        label = f"{run.name}: accuracy over the distance in rank, on held-out pairs"
        panels.append(
            Panel("accuracy by distance in rank", _drawn(series, label, "distance", limits=(0, 1.05), percent=True))
        )
    if bins:
        series = [Series("pairs", [Dot(predicted, *observed) for predicted, observed in bins], 0, "points")]
        label = f"{run.name}: how often the order of a pair is right, over the probability that the scores predict"
        options |= {"integers": False, "diagonal": True}
        panels.append(Panel("calibration", _drawn(series, label, "predicted probability", **options)))
    return Calibration(by_distance, panels)


def _measured(value: Any, error: Any) -> Measured:
    return Measured(float(value), None if error is None else float(error))


def _without_pairs(run: ReportedRun) -> Calibration:
    """The accuracies in the manifest, which have no errors."""
    prefix = "eval_accuracy_distance_"
    rows = [
        Distance(name.removeprefix(prefix).replace("3plus", "3 or more"), None, Measured(float(value)))
        for name, value in run.metrics.items()
        if name.startswith(prefix)
    ]
    missing = "no pairs.json: without it, there are no errors of these accuracies, and no calibration"
    return Calibration(rows, [], missing if rows else "no pairs.json: no accuracy by distance, and no calibration")


# --- the frontier ----------------------------------------------------------------------------------------------------


class Frontier(NamedTuple):
    """Runs whose scores are of the same reward, and can be compared."""

    score: str  # such as "score by runs/rm"
    runs: list[ReportedRun]
    panels: list[Panel]


def frontiers(runs: Sequence[ReportedRun], points: Mapping[str, Sequence[Point]]) -> list[Frontier]:
    """The reward-KL frontiers. ``points`` are those of each run, by its name."""
    of_reward: dict[tuple[str, str, str | None], list[ReportedRun]] = {}
    for run in runs:
        if points.get(run.name):
            of_reward.setdefault(_reward(run), []).append(run)
    return [
        Frontier(score, of_runs, list(_frontier_panels(score, gold, of_runs, points)))
        for (score, _, gold), of_runs in of_reward.items()
    ]


def _reward(run: ReportedRun) -> tuple[str, str, str | None]:
    """The reward that scored a run: its label, its identity, and the label of the second reward or judge."""
    reward = run.settings.get("reward") or {}
    parents = {role: parent["weights"] for role, parent in run.record["parents"].items() if role.startswith("reward")}
    score, gold, rewards = frontier.labels(run.folder) or (
        f"score by {reward.get('name', 'unknown reward')}",
        None,
        None,
    )
    return score, json.dumps(rewards or parents or reward, sort_keys=True), gold


def _frontier_panels(
    score: str, gold: str | None, runs: Sequence[ReportedRun], points: Mapping[str, Sequence[Point]]
) -> Iterator[Panel]:
    scores = [Series(run.name, [_dot(p, p.score, p.score_error) for p in points[run.name]]) for run in runs]
    yield _frontier_panel(score, scores)
    judged = [
        Series(run.name, [_dot(p, p.gold, p.gold_error) for p in points[run.name] if p.gold is not None])
        for run in runs
    ]
    if any(each.dots for each in judged):
        yield _frontier_panel(gold or "score by the gold reward", judged)


def _frontier_panel(title: str, series: Sequence[Series]) -> Panel:
    numbered = [Series(each.name, each.dots, number, "path") for number, each in enumerate(series)]
    label = f"{title} over the square root of the KL"
    return Panel(title, _drawn(numbered, label, "√KL (KL in nats per answer)", integers=False, size=(5.4, 2.9)))


def _dot(point: Point, value: float, error: float | None) -> Dot:
    kl = max(point.kl, 0.0)  # an estimate of a small KL can be negative
    x_error = point.kl_error / (2 * math.sqrt(kl)) if point.kl_error and kl > 0 else None  # of the square root
    return Dot(math.sqrt(kl), value, error, x_error)
