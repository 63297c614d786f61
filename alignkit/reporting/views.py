"""The content of the page for one run, as text. A part that cannot be read is a note in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from alignkit.errors import one_line
from alignkit.reporting import numbers, results
from alignkit.reporting.charts import Calibration, calibration
from alignkit.reporting.folders import ReportedRun
from alignkit.reporting.numbers import Measured
from alignkit.reporting.results import Change, WinRate
from alignkit.runs import answers, frontier
from alignkit.runs import evaluations as recorded_evaluations
from alignkit.runs.answers import Answers
from alignkit.runs.frontier import Point

T = TypeVar("T")
SHOWN = 20  # answers of a run
LONGEST = 2000  # characters of an answer or a prompt


class Text(NamedTuple):
    """A text of the user or a model, perhaps shortened."""

    start: str
    left_out: int  # characters


class Answer(NamedTuple):
    """Answers to a prompt before and after training."""

    prompt: Text
    before: Text | None
    after: Text
    score_before: str
    score_after: str


class Evaluated(NamedTuple):
    """A row of ``alignkit evaluate`` as text."""

    what: str  # perplexity on a file, or a metric of a task
    value: str
    change: str  # from the run that it is compared with
    compared_with: str


class Source(NamedTuple):
    """A source of the data of a run."""

    path: str
    format: str
    rows: str
    weight: float


@dataclass
class View:
    """A run on the page."""

    run: ReportedRun
    number: int
    evaluations: list[Answers]
    frontier: list[Point]
    calibration: Calibration | None  # of a reward model
    headline: Change | None
    changes: list[Change]
    win_rate: WinRate | None
    evaluated: list[Evaluated]  # by ``alignkit evaluate``

    @property
    def id(self) -> str:
        return f"run-{self.number}"

    @property
    def state(self) -> str:
        """Of the run; of a finished one, what came out."""
        if self.run.state == "training":
            return f"is training, at step {self.run.step:,}"
        if self.run.state == "stopped":
            return f"stopped at step {self.run.step:,}"
        return self.headline.verdict if self.headline else "not evaluated"

    @property
    def tone(self) -> str:
        """The class of the state in the style sheet."""
        if not self.run.is_finished:
            return "warn"
        return {"improved": "good", "got worse": "bad"}.get(self.state, "neutral")

    @property
    def short(self) -> str:
        """The result in a few characters, such as ``"score −1.37 → 1.13"``."""
        if self.headline is None or not self.run.is_finished:
            return self.state
        without_errors = self.headline._replace(
            before=self.headline.before and Measured(self.headline.before.value),
            after=Measured(self.headline.after.value),
        )
        return change_text(without_errors)

    @property
    def others(self) -> list[str]:
        """The other metrics that the stage watches."""
        shown = [each for each in self.changes if each.metric in self.run.watch and each != self.headline]
        return [change_text(each) for each in shown]

    @property
    def sources(self) -> list[Source]:
        """The data of the run; of an unfinished one, what its config names."""
        data = self.run.record.get("data")
        if data is None:
            path = self.run.settings["data"]["path"]
            return [Source(str(each), "", "", 1.0) for each in (path if isinstance(path, list) else [path])]
        one = {"path": data["source"], "format": data["format"]}  # runs of one source, without `sources`
        return [
            Source(str(s["path"]), str(s["format"]), f"{s['rows']:,}" if "rows" in s else "", s.get("weight", 1.0))
            for s in data.get("sources", [one])
        ]

    @property
    def twenty(self) -> list[Answer]:
        """The first answers of the held-out prompts, before training and at the last evaluation."""
        return list(_side_by_side(self.evaluations))[:SHOWN] if self.evaluations else []

    @property
    def lengths(self) -> str:
        """The tokens of an answer to a held-out prompt."""
        change = next((each for each in self.changes if each.metric == "length"), None)
        return change_text(change, name=False) if change else ""

    @property
    def row_lengths(self) -> str:
        """The tokens of its rows, such as ``"median 61, longest 214"``."""
        lengths = self.run.record.get("data", {}).get("lengths")
        return f"median {lengths['median']:,.0f}, longest {lengths['longest']:,}" if lengths else ""

    @property
    def plugins(self) -> str:
        """The plugins that its command or config names."""
        return ", ".join(self.run.config["plugins"])

    @property
    def seconds(self) -> float | None:
        return self.run.record.get("seconds")

    @property
    def peak_memory(self) -> int | None:
        """Bytes of tensors on the GPU."""
        return self.run.record.get("peak_memory")

    @property
    def verdict(self) -> str:
        """The verdict of a reward model."""
        return str(self.run.record.get("verdict", ""))

    @property
    def settings(self) -> list[str]:
        """Other things that the time of the run depends on, such as ``["bfloat16", "2 processes"]``."""
        dtype, processes = self.run.record.get("dtype"), self.run.record.get("processes", 1)
        return [*([dtype] if dtype else []), *([f"{processes} processes"] if processes > 1 else [])]

    @property
    def finished(self) -> str:
        """When it was finished."""
        return str(self.run.record.get("finished", "")).replace("T", " ").replace("Z", " UTC")

    @property
    def versions(self) -> dict[str, str]:
        return dict(self.run.record.get("versions", {}))


def view(run: ReportedRun, number: int) -> View:
    """Read everything that the page shows of a run. What cannot be read becomes one of the run's notes."""

    def attempt(file: str, read: Callable[[Path], T], otherwise: T) -> T:
        try:
            return read(run.folder)
        except Exception as error:  # a file that another program wrote, or that was cut
            run.notes.append(f"{file} cannot be read: {one_line(error)}")
            return otherwise

    evaluations = attempt(answers.FILE, answers.read, list[Answers]())
    points = attempt(frontier.FILE, frontier.points, list[Point]())
    is_reward = run.record.get("role") == "reward"
    pairs = attempt("pairs.json", lambda _: calibration(run), None) if is_reward else None
    changes = results.changes(run, evaluations)
    headline, rate = results.headline(run, changes), results.win_rate(evaluations)
    evaluated = attempt(recorded_evaluations.FILE, lambda folder: list(_evaluated(folder)), list[Evaluated]())
    return View(run, number, evaluations, points, pairs, headline, changes, rate, evaluated)


def _evaluated(folder: Path) -> Iterator[Evaluated]:
    tables = recorded_evaluations.read(folder)
    for row in tables["perplexity"]:
        change = _measured(row, "difference")
        nats = f"{numbers.text(change, sign=True)} nats per token" if change else ""
        value = numbers.text(Measured(row["perplexity"], row["perplexity_error"]))
        yield Evaluated(f"perplexity on {row['data']}", value, nats, row["compared_with"] or "")
    for row in tables["tasks"]:
        change, percent = _measured(row, "difference"), row["metric"].startswith(("acc", "exact_match"))
        value = numbers.text(Measured(row["value"], row["error"]), percent)
        moved = numbers.text(change, percent, sign=True) if change else ""
        yield Evaluated(f"{row['task']}, {row['metric']}", value, moved, row["compared_with"] or "")


def _measured(row: dict[str, Any], name: str) -> Measured | None:
    return None if row[name] is None else Measured(row[name], row[f"{name}_error"])


def change_text(change: Change, name: bool = True) -> str:
    """Such as ``"score −1.37 ± 0.30 → 1.13 ± 0.23"``."""
    percent = numbers.is_probability(change.metric)
    sides = [numbers.text(side, percent) for side in (change.before, change.after) if side is not None]
    return f"{numbers.label(change.metric)} {' → '.join(sides)}" if name else " → ".join(sides)


def difference_text(change: Change) -> str:
    """Such as ``"+2.51 ± 0.31"``; empty if there is nothing to compare with."""
    if change.difference is None:
        return ""
    return numbers.text(change.difference, numbers.is_probability(change.metric), sign=True)


def percent(share: float) -> str:
    """Such as ``"84%"``."""
    return f"{100 * share:.0f}%"


def win_text(rate: WinRate) -> str:
    """Such as ``"84% of 32 prompts (95% interval 68% to 93%)"``."""
    low, high = rate.interval
    return f"{percent(rate.rate)} of {rate.prompts:,} prompts (95% interval {percent(low)} to {percent(high)})"


def _side_by_side(evaluations: list[Answers]) -> Iterator[Answer]:
    last = evaluations[-1]
    first = evaluations[0] if evaluations[0].step == 0 and len(evaluations) > 1 else None
    paired = first is not None and first.prompts == last.prompts
    for number, (prompt, after) in enumerate(zip(last.prompts, last.answers, strict=True)):
        before = _cut(first.answers[number]) if paired and first is not None else None
        scores = [_score(each, number) if each is not None else "" for each in (first if paired else None, last)]
        yield Answer(_cut(prompt), before, _cut(after), *scores)


def _score(evaluation: Answers, number: int) -> str:
    column = evaluation.columns.get("score", [])
    value: Any = column[number] if number < len(column) else None
    return numbers.text(Measured(float(value))) if isinstance(value, int | float) else ""


def _cut(text: str) -> Text:
    return Text(text[:LONGEST], max(0, len(text) - LONGEST))


class Compared(NamedTuple):
    """A row of ``alignkit compare`` as text."""

    run: str
    score: str
    win_rate: str
    judge_win_rate: str
    kl: str
    length: str


def compared(row: Any) -> Compared:
    """Read a row of ``alignkit compare``.

    Raises:
        TypeError, KeyError, ...: it is not one.
    """
    cells = {}
    for name in Compared._fields[1:]:
        value, error = row.get(name), row.get(f"{name}_error")
        measured = None if value is None else Measured(float(value), None if error is None else float(error))
        cells[name] = "" if measured is None else numbers.text(measured, name.endswith("win_rate"))
    return Compared(str(row["run"]), **cells)
