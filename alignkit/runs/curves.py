"""The curves of a run, from its ``metrics.jsonl``: as a picture, and as lines for a terminal. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignkit.runs import pictures, record
from alignkit.runs.pictures import can_draw as can_draw
from alignkit.runs.resume import METRICS

PICTURES = ("curves.svg", "curves.png")  # in the run folder
PANELS = 12  # at most, in a picture
COLUMNS = 3
HELD_OUT = "eval_"
NOT_DRAWN = ("epoch", "step", "total_flos", "num_tokens", "train_loss", "grad_norm", "pairs")  # no results of training
TIMES = ("runtime", "_per_second")
BLOCKS = "▁▂▃▄▅▆▇█"


class Point(NamedTuple):
    """A metric at a step."""

    step: int
    value: float
    error: float | None = None  # its standard error


class Curve(NamedTuple):
    """A metric over the steps of a run."""

    name: str
    train: list[Point]  # over the steps since the last log
    held_out: list[Point]


def read(file: Path, first: Sequence[str] = ()) -> list[Curve]:
    """The curves of a metrics file: the metrics named in ``first``, then losses, then others in alphabetical order.

    A line that is not complete yet is left out, as are metrics that never change, and values that are not finite.
    """
    logged: dict[tuple[str, bool], dict[int, Point]] = {}
    for row in rows(file):
        for key, value in row.items():
            name, held_out = key.removeprefix(HELD_OUT), key.startswith(HELD_OUT)
            if _is_drawn(name) and isinstance(value, int | float) and math.isfinite(value):
                error = row.get(f"{key}_error")
                point = Point(int(row["step"]), float(value), error if isinstance(error, int | float) else None)
                logged.setdefault((name, held_out), {})[point.step] = point
    names = sorted({name for name, _ in logged}, key=lambda name: _order(name, first))
    curves = [Curve(name, *(_points(logged.get((name, held_out), {})) for held_out in (False, True))) for name in names]
    return [curve for curve in curves if curve.name in first or _changes(curve)]


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file such as ``metrics.jsonl`` that are JSON objects with a ``step``; others are left out."""
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = record.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def _is_drawn(name: str) -> bool:
    return name not in NOT_DRAWN and not name.endswith((*TIMES, "_error")) and not name.startswith("seconds_")


def _order(name: str, first: Sequence[str]) -> tuple[int, int, str]:
    return (0, first.index(name), name) if name in first else (1 if "loss" in name else 2, 0, name)


def _points(of_step: Mapping[int, Point]) -> list[Point]:
    return [of_step[step] for step in sorted(of_step)]


def _changes(curve: Curve) -> bool:
    return any(len({point.value for point in points}) > 1 for points in (curve.train, curve.held_out))


def draw(folder: Path, title: str, first: Sequence[str] = ()) -> None:
    """Draw the curves of the run in ``folder`` into its :data:`PICTURES`. Held-out points have error bars.

    Needs matplotlib. Does nothing if there is nothing to draw yet.
    """
    curves = read(folder / METRICS, first)[:PANELS]
    if not curves:
        return
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(curves))
    lines = math.ceil(len(curves) / columns)
    with matplotlib.rc_context(pictures.STYLE):
        figure = Figure(figsize=(3.6 * columns, 2.3 * lines + 0.5), layout="constrained")
        figure.suptitle(title, fontsize=11)
        for number, curve in enumerate(curves, 1):
            axes = figure.add_subplot(lines, columns, number)
            _draw(axes, curve)
            if number > len(curves) - columns:
                axes.set_xlabel("step")
        handles = {
            label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower right", ncols=2, frameon=False)
        for name in PICTURES:
            pictures.save(figure, folder / name)


def _draw(axes: object, curve: Curve) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    if curve.train:
        marker = "." if len(curve.train) < 30 else ""
        axes.plot([p.step for p in curve.train], [p.value for p in curve.train], marker=marker, label="training")
    if curve.held_out:
        steps, values = [p.step for p in curve.held_out], [p.value for p in curve.held_out]
        errors = [p.error or 0 for p in curve.held_out]
        axes.errorbar(steps, values, errors, fmt="o:", color="C1", capsize=3, label="held out")
    axes.set_title(curve.name.replace("_", " "), fontsize=9, loc="left")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def sparkline(points: Sequence[Point], width: int = 40) -> str:
    """A curve as a line of block characters; several points may share one."""
    size = math.ceil(len(points) / width)
    groups = [points[start : start + size] for start in range(0, len(points), size or 1)]
    means = [sum(p.value for p in group) / len(group) for group in groups]
    low, high = min(means, default=0), max(means, default=0)
    step = (high - low) / (len(BLOCKS) - 1) or 1
    return "".join(BLOCKS[round((mean - low) / step)] for mean in means)
