"""The page: one HTML file without scripts, in which nothing is loaded from elsewhere."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from alignkit.errors import ConfigError
from alignkit.reporting import charts, folders, numbers, pictures, views
from alignkit.reporting.charts import Frontier, StageCurves
from alignkit.reporting.folders import NotShown
from alignkit.reporting.lineage import Lineage, Node, described, lineage
from alignkit.reporting.results import BEYOND
from alignkit.reporting.views import Compared, View, compared
from alignkit.runs import curves

HERE = Path(__file__).parent
COMPARISON = "comparison.jsonl"  # in a folder of runs, written by `alignkit compare --output`
NO_PICTURES = "matplotlib, which draws the pictures, is not installed: pip install 'alignkit[plot]'"


class Report(NamedTuple):
    """A page, and what it shows."""

    html: str
    runs: int
    not_shown: list[NotShown]


@dataclass
class Page:
    """The values that the template fills in."""

    title: str
    views: list[View]
    lineage: Lineage
    stages: list[StageCurves]
    frontiers: list[Frontier]
    comparison: list[Compared]
    not_shown: list[NotShown]
    has_pictures: bool
    written: str
    version: str

    @property
    def models(self) -> list[str]:
        """The base models."""
        return list(dict.fromkeys(str(view.run.record["model"]["name"]) for view in self.views))

    @property
    def outcomes(self) -> str:
        """Such as ``"2 improved, 1 with no measurable change"``."""
        states = Counter(view.state if view.run.is_finished else "not finished" for view in self.views)
        return ", ".join(
            f"{number} {'with ' if state.startswith('no ') else ''}{state}" for state, number in states.most_common()
        )

    @property
    def has_lengths(self) -> bool:
        """Whether the length of a run's rows is recorded."""
        return any(view.row_lengths for view in self.views)

    @property
    def seconds(self) -> float:
        """The time of all runs for which it is recorded."""
        return sum(view.seconds or 0 for view in self.views)

    @property
    def unfinished(self) -> list[View]:
        return [view for view in self.views if not view.run.is_finished]

    @property
    def rewards(self) -> list[View]:
        return [view for view in self.views if view.calibration]

    @property
    def answering(self) -> list[View]:
        return [view for view in self.views if view.evaluations]

    @property
    def evaluated(self) -> list[View]:
        return [view for view in self.views if view.evaluated]

    @property
    def environments(self) -> list[tuple[list[View], dict[str, str]]]:
        """The versions of packages, each with the runs that were trained with them."""
        groups: dict[str, list[View]] = {}
        for view in self.views:
            if view.versions:
                groups.setdefault(json.dumps(view.versions, sort_keys=True), []).append(view)
        return [(group, group[0].versions) for group in groups.values()]

    @property
    def has_memory(self) -> bool:
        """Whether the peak memory of a run is recorded."""
        return any(view.peak_memory for view in self.views)

    def view_of(self, node: Node) -> View | None:
        """The run of a node of the lineage, if it is in the report."""
        return next((view for view in self.views if view.run is node.run), None)

    @property
    def notes(self) -> list[NotShown]:
        """Parts of runs that could not be read."""
        return [NotShown(view.run.name, note) for view in self.views for note in view.run.notes]


def report(paths: Sequence[Path]) -> Report:
    """The report on the runs in these folders.

    Raises:
        ConfigError: a folder does not exist, or none of them contains a run.
    """
    from alignkit import __version__

    runs, not_shown = folders.find(paths)
    if not runs:
        reasons = "; ".join(f"{each.name}: {each.reason}" for each in not_shown[:3])
        raise ConfigError(f"report: no run found in {', '.join(map(str, paths))} ({reasons})")
    with pictures.style() if curves.can_draw() else contextlib.nullcontext():
        shown = [views.view(run, number) for number, run in enumerate(runs, 1)]
        page = Page(
            title=", ".join(map(str, paths)),
            views=shown,
            lineage=lineage(runs),
            stages=charts.stage_curves(runs),
            frontiers=charts.frontiers(runs, {view.run.name: view.frontier for view in shown}),
            comparison=_comparison(paths, not_shown),
            not_shown=not_shown,
            has_pictures=curves.can_draw(),
            written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            version=__version__,
        )
    return Report(render(page), len(runs), not_shown)


def render(page: Page) -> str:
    """The HTML. Everything but the pictures is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"numbers": numbers, "BEYOND": BEYOND, "NO_PICTURES": NO_PICTURES}
    environment.globals |= {"change": views.change_text, "difference": views.difference_text}
    environment.globals |= {"win": views.win_text, "percent": views.percent, "described": described}
    environment.globals["css"] = Markup((HERE / "report.css").read_text(encoding="utf-8"))
    html = environment.get_template("report.html.jinja").render(page=page)
    return html.encode("utf-8", "replace").decode()  # half of a surrogate pair, in a text that was cut


def _comparison(paths: Sequence[Path], not_shown: list[NotShown]) -> list[Compared]:
    """The rows of ``alignkit compare`` in these folders."""
    rows = list[Compared]()
    for file in (path / COMPARISON for path in paths if (path / COMPARISON).is_file()):
        with file.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    rows.append(compared(json.loads(line)))
                except (ValueError, TypeError, LookupError, AttributeError):
                    not_shown.append(NotShown(f"{file}, line {number}", "not a row of alignkit compare"))
    return rows
