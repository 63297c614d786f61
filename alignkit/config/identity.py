"""Which settings make a run what it is, and which a resume may change. No torch here.

A field of a config dataclass says so itself (:func:`alignkit.option`); for the ``train`` table,
:mod:`alignkit.config.training_args` does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from alignkit.components import Resume
from alignkit.config import training_args
from alignkit.config.resolve import RunConfig, TopLevel

Path = tuple[str, ...]  # of a setting in `RunConfig.to_dict`


@dataclass(frozen=True)
class Change:
    """A setting that a run was made with, and what a config says instead."""

    path: Path
    before: Any
    after: Any
    resume: Resume

    def __str__(self) -> str:
        return f"{'.'.join(self.path).removeprefix('stages.')} was {self.before!r}, is {self.after!r}"

    @property
    def grows(self) -> bool:
        """Whether training may now end later. None is no limit, and so is ``max_steps=-1``."""
        if self.resume != "may_grow":
            return False
        return any(value is None or value < 0 for value in (self.before, self.after)) or self.after > self.before

    @property
    def allowed(self) -> bool:
        """Whether a resume may come with it."""
        return self.resume == "may_change" or self.grows


def changes(record: Mapping[str, Any], config: RunConfig) -> list[Change]:
    """How ``config`` differs from that of a run, ``record``, which is in the shape of :meth:`RunConfig.to_dict`."""
    rules = _rules(config)
    train: Path = ("stages", config.stage.component.name, "train")
    if _rows_a_step(_at(record, train)) == _rows_a_step(config.train):  # then it is a matter of memory
        rules |= dict.fromkeys([(*train, key) for key in ROWS_A_STEP], "may_change")
    found = []
    for path, before, after in _differences(record, config.to_dict(), ()):
        setting = next((path[:n] for n in range(len(path), 0, -1) if path[:n] in rules), path)  # it may be a table
        found.append(Change(path, before, after, rules.get(setting, "same")))
    return found


ROWS_A_STEP = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}  # and what Transformers takes


def _rows_a_step(train: Mapping[str, Any]) -> int:
    return math.prod(train.get(key, default) for key, default in ROWS_A_STEP.items())


def _at(table: Any, path: Path) -> Any:
    for key in path:
        table = table.get(key, {})
    return table


def _rules(config: RunConfig) -> dict[Path, Resume]:
    """What a resume may do with the settings that it need not keep."""
    stage: Path = ("stages", config.stage.component.name)
    tables: dict[Path, Any] = {(): TopLevel(), stage: config.stage.config, (*stage, "data"): config.data}
    for kind in ("tuner", "optimizer"):
        tables[(kind,)] = getattr(config, kind).config
    for kind in ("loss", *config.stage.component.uses):
        tables[*stage, kind] = getattr(config, kind).config
    of_train = training_args.on_resume(config.train) | dict(config.stage.component.resume)
    rules: dict[Path, Resume] = {(*stage, "train", name): resume for name, resume in of_train.items()}
    for where, table in tables.items():
        rules |= _of_table(where, table)
    return rules


def _of_table(where: Path, table: Any) -> dict[Path, Resume]:
    """The rules of a config dataclass, and of those in it."""
    rules: dict[Path, Resume] = {}
    for field in dataclasses.fields(table):
        resume, value = field.metadata.get("resume", "same"), getattr(table, field.name)
        resume = resume(table) if callable(resume) else resume
        if resume != "same":
            rules[*where, field.name] = resume
        elif dataclasses.is_dataclass(value):
            rules |= _of_table((*where, field.name), value)
    return rules


def _differences(before: Any, after: Any, path: Path) -> Iterator[tuple[Path, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys([*before, *after]):
            yield from _differences(before.get(key), after.get(key), (*path, key))
    elif before != after:
        yield path, before, after
