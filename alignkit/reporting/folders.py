"""Finds run folders and reads what they record. A folder that cannot be read becomes a reason, not an error."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from alignkit import paths
from alignkit.components import Stage
from alignkit.errors import AlignkitError, ConfigError, one_line, suggestion
from alignkit.registry.plugin import in_memory as in_memory_names
from alignkit.reporting import numbers
from alignkit.runs import curves, lock, manifest, recorded, resume
from alignkit.runs.curves import Curve

DEPTH = 3  # folders in folders in which runs are searched
UNFINISHED = ".unfinished"

State = Literal["finished", "training", "stopped"]


class NotShown(NamedTuple):
    """A folder or a part of a run that the report does not show, and why."""

    name: str
    reason: str


@dataclass
class ReportedRun:
    """A run folder: its manifest, or what the config of an unfinished run says under the same keys."""

    folder: Path
    name: str  # relative to the folder that the report is about, such as "seed-1/ppo"
    state: State
    record: dict[str, Any]
    curves: list[Curve]
    declared: Stage | None  # None if its plugin is not installed
    notes: list[str] = field(default_factory=list)  # parts of it that could not be read

    @property
    def stage(self) -> str:
        return str(self.record["stage"])

    @property
    def watch(self) -> tuple[str, ...]:
        """The metrics that its stage prints."""
        return self.declared.watch if self.declared else ()

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.record["config"])

    @property
    def settings(self) -> dict[str, Any]:
        """The table of its stage."""
        return dict(self.config["stages"][self.stage])

    @property
    def metrics(self) -> dict[str, float]:
        return dict(self.record.get("metrics", {}))

    @property
    def is_finished(self) -> bool:
        return self.state == "finished"

    @cached_property
    def step(self) -> int:
        """The number of steps, so far if it is not finished."""
        logged = (points[-1].step for curve in self.curves for points in curve[1:] if points)
        return int(self.record.get("steps", max(logged, default=0)))

    @property
    def command(self) -> str:
        """The command that continues the run, or makes it again; in Python if it used plugins in memory."""
        parent = self.folder.parent
        if in_memory := in_memory_names(self.config["plugins"]):
            start = f"config={str(self.folder / recorded.CONFIG)!r}, output='again'"
            resumed = f"{self.stage!r}, output={str(parent)!r}, resume=True"
            defined = f", plugins=[{', '.join(in_memory)}]"
            return f"in Python, alignkit.train({start if self.is_finished else resumed}{defined})"
        if self.is_finished:
            return f"alignkit train -c {_word(self.folder / recorded.CONFIG)} --output again"
        return f"alignkit train --plugin {self.stage} --output {_word(parent)} --resume"


def _word(path: Path) -> str:
    return shlex.quote(str(path))


def find(given: Sequence[Path]) -> tuple[list[ReportedRun], list[NotShown]]:
    """The runs in these folders, which are run folders or contain some, and the folders that are not shown.

    Raises:
        ConfigError: there is no such folder.
    """
    runs, not_shown = list[ReportedRun](), list[NotShown]()
    named = [paths.named(path) for path in given]
    root = Path(os.path.commonpath([path.absolute() for path in named]))
    found = dict[Path, Path]()
    for folder in (each for path in named for each in _folders(path)):
        found.setdefault(folder.resolve(), folder)  # "runs" and "/home/me/runs" are one folder
    for folder in found.values():
        inside = folder.absolute() != root and folder.absolute().is_relative_to(root)
        name = str(folder.absolute().relative_to(root)) if inside else folder.name
        if not _is_run(folder):
            not_shown.append(NotShown(name, "not a run: it has no alignkit.json"))
            continue
        try:
            runs.append(_read(folder, name))
        except Exception as error:  # files that another version or program wrote
            reason = str(error) if isinstance(error, AlignkitError) else f"cannot be read: {one_line(error)}"
            not_shown.append(NotShown(name, reason))
    return sorted(runs, key=lambda run: (run.record.get("finished") or "~", run.name)), not_shown


def _folders(path: Path) -> Iterator[Path]:
    """The run folders at a path, and the folders beside them that contain no run."""
    unfinished = manifest.unfinished(path)
    if _is_run(path) or _is_run(unfinished):
        yield from filter(_is_run, (path, unfinished))
        return
    if not path.is_dir():
        beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(suggestion(f"report: there is no folder {path}", path.name, beside))
    yield from _inside(path, DEPTH) or [path]


def _inside(folder: Path, depth: int) -> list[Path]:
    """The runs in a folder, and its folders without any. Empty if it contains no run."""
    below, any_run = list[Path](), False
    for child in _children(folder):
        if _is_run(child):
            below, any_run = [*below, child], True
        elif child.name.endswith(UNFINISHED):
            continue  # a run that is being removed
        elif depth > 1 and (inside := _inside(child, depth - 1)):
            below, any_run = [*below, *inside], True
        else:
            below.append(child)
    return below if any_run else []


def _children(folder: Path) -> list[Path]:
    with contextlib.suppress(PermissionError):
        return sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    return []


def _is_run(folder: Path) -> bool:
    if folder.name.endswith(UNFINISHED):
        return (folder / recorded.CONFIG).is_file() and not folder.name.endswith(f".former{UNFINISHED}")
    return manifest.is_run(folder)


def _read(folder: Path, name: str) -> ReportedRun:
    """Read a run folder.

    Raises:
        AlignkitError: another version of alignkit wrote it, or it cannot be read.
        KeyError, TypeError, ...: a file has other content than alignkit writes.
    """
    if folder.name.endswith(UNFINISHED):
        state: State = "training" if lock.is_held(folder) else "stopped"
        config = recorded.read(folder)
        stage = next(reversed(config["stages"]))
        _check_config(config, stage)
        record = {"stage": stage, "tuner": config["tuner"]["name"], "model": {"name": config["model"]}}
        record |= {"config": config, "parents": {}}
    else:
        state, record = "finished", _checked(manifest.read(folder))
    declared = recorded.stage(record["config"])
    file = folder / resume.METRICS
    notes = [] if file.exists() else [f"no {resume.METRICS}, so there are no curves"]
    run_curves = curves.read(file, declared.watch if declared else ()) if file.exists() else []
    if unread := _unread(file):
        notes.append(f"{numbers.count(unread, 'line')} of {resume.METRICS} cannot be read, and left out")
    finished = folder.with_name(folder.name.removesuffix(UNFINISHED))
    mark = " (unfinished)" if state != "finished" and manifest.is_run(finished) else ""
    return ReportedRun(folder, name.removesuffix(UNFINISHED) + mark, state, record, run_curves, declared, notes)


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    """The manifest, if it has what the report reads.

    Raises:
        KeyError, TypeError, ...: it has not.
    """
    _check_config(record["config"], record["stage"])
    data = record["data"]
    _ = data["source"], data["format"], record["model"]["name"]
    _ = record["tuner"], record["role"], record["fingerprints"]["weights"], int(record["steps"])
    _ = [(parent["folder"], parent["weights"]) for parent in record["parents"].values()]
    return record


def _check_config(config: dict[str, Any], stage: str) -> None:
    _ = config["stages"][stage]["data"]["path"], config["plugins"]


def _unread(file: Path) -> int:
    """The number of lines of a metrics file that are not a JSON object with a step."""
    if not file.exists():
        return 0
    with file.open(encoding="utf-8", errors="replace") as lines:
        return sum(1 for _ in lines) - sum(1 for _ in curves.rows(file))
