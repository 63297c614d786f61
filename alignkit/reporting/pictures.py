"""Pictures for the page: SVG by matplotlib whose colors and fonts are those of the page, in light and dark.

matplotlib writes colors as numbers. The pictures use numbers that stand for CSS variables and are replaced by them.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup, escape

COLORS = 8  # of series, in the style sheet
VARIABLES = {"#010101": "--text", "#020202": "--soft", "#030303": "--line"} | {
    f"#04040{number}": f"--series-{number}" for number in range(1, COLORS + 1)
}
TEXT, SOFT, LINE, *SERIES = VARIABLES
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # of runs beyond the number of colors
WIDTH, HEIGHT = 3.3, 1.8  # inches of 72 points
POINTS = 400  # of a line, at most


@dataclass(frozen=True)
class Dot:
    """A point with its error bars."""

    x: float
    y: float
    y_error: float | None = None
    x_error: float | None = None


@dataclass(frozen=True)
class Series:
    """A curve of a picture."""

    name: str
    dots: Sequence[Dot]
    number: int = 0  # which color and dashes
    style: Literal["line", "points", "path"] = "line"  # points have error bars; those of a path are joined by its line

    @property
    def color(self) -> str:
        return SERIES[self.number % COLORS]

    @property
    def dashes(self) -> Any:
        return DASHES[self.number // COLORS % len(DASHES)]


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The style of all pictures of a page. Needs matplotlib."""
    import matplotlib

    settings = {
        **{"svg.fonttype": "none", "svg.hashsalt": "alignkit", "font.size": 10, "text.color": TEXT},
        **{"xtick.color": SOFT, "ytick.color": SOFT, "axes.labelcolor": SOFT, "axes.edgecolor": LINE},
        **{"xtick.major.size": 0, "ytick.major.size": 0, "axes.linewidth": 0.8, "axes.formatter.limits": (-3, 4)},
        **{"axes.formatter.useoffset": False, "axes.formatter.use_mathtext": False, "axes.unicode_minus": True},
    }
    with matplotlib.rc_context(settings):
        yield


def draw(
    series: Sequence[Series],
    label: str,
    x_label: str = "",
    *,
    integers: bool = True,
    percent: bool = False,
    diagonal: bool = False,
    limits: tuple[float, float] | None = None,
    size: tuple[float, float] = (WIDTH, HEIGHT),
) -> Markup:
    """Draw curves as an SVG element, within :func:`style`.

    Args:
        series: the curves.
        label: what the picture shows, for screen readers.
        x_label: what the x axis is.
        integers: whether the x axis has integers only.
        percent: whether y is shown in percent.
        diagonal: draw the line y = x.
        limits: the lowest and the highest y.
        size: width and height in inches.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    width, height = size
    figure = Figure(figsize=size)
    below = 0.42 if x_label else 0.25
    axes = figure.add_axes((0.55 / width, below / height, 1 - 0.68 / width, 1 - (below + 0.18) / height))
    axes.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=integers))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel(x_label, labelpad=2)
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    if diagonal:
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=0.8, linestyle=(0, (2, 2)))
    for each in series:
        _add(axes, each)
    if limits:
        axes.set_ylim(*limits)
    return Markup(_themed(_svg(figure), label))  # matplotlib escapes the text in it


def _add(axes: Any, series: Series) -> None:
    dots = thinned(series.dots)
    x, y = [dot.x for dot in dots], [dot.y for dot in dots]
    if series.style == "line":
        marker = "." if len(dots) == 1 else ""
        axes.plot(x, y, color=series.color, linestyle=series.dashes, linewidth=1.3, alpha=0.5, marker=marker)
        return
    axes.errorbar(
        x,
        y,
        yerr=[dot.y_error or 0 for dot in dots],
        xerr=[dot.x_error or 0 for dot in dots] if any(dot.x_error for dot in dots) else None,
        color=series.color,
        fmt="o",
        markersize=4,
        linestyle=(0, (1, 2)) if series.style == "points" else series.dashes,
        linewidth=1.1,
        elinewidth=1.1,
        capsize=2.5,
    )


def thinned(dots: Sequence[Dot]) -> Sequence[Dot]:
    """At most :data:`POINTS` dots: means of neighbors, if there are more."""
    size = math.ceil(len(dots) / POINTS)
    if size < 2:
        return dots
    groups = [dots[start : start + size] for start in range(0, len(dots), size)]
    return [Dot(sum(d.x for d in group) / len(group), sum(d.y for d in group) / len(group)) for group in groups]


def _svg(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _themed(svg: str, label: str) -> str:
    """The SVG element for a page: without a size, with the colors and the font of the page, with short numbers."""
    svg = svg[svg.index("<svg") :]
    head, rest = svg.split(">", 1)
    box = re.search(r'viewBox="([^"]*)"', head)
    assert box is not None
    rest = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", rest, flags=re.DOTALL)
    rest = re.sub(r'(?: id="(?:figure|axes|patch|text|line2d|matplotlib|xtick|ytick|LineCollection)[^"]*")', "", rest)
    rest = re.sub(r' (?:d|x|y|transform)="[^"]*"', _shortened, rest)
    rest = re.sub(r"font-family: [^;\"]*; ", "", rest).replace("rotate(-0 ", "rotate(0 ")
    rest = re.sub(r"#0[1-4]0[1-4]0\d", lambda color: f"var({VARIABLES[color[0]]})", rest)
    prefix = f"p{zlib.crc32((label + svg).encode()):x}-"  # ids are those of a page, which has several pictures
    rest = re.sub(r'(?<= id=")|(?<=url\(#)|(?<=xlink:href="#)', prefix, rest).replace("xlink:href", "href")
    rest = re.sub(r"\n\s*", "\n", rest)
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(label)}">{rest}'


def _shortened(attribute: re.Match[str]) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", attribute[0])
