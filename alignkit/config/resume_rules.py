"""The settings that a resume may change.

The fields of config dataclasses declare it (see :func:`alignkit.option`). :mod:`alignkit.config.training_args` declares
it for the ``train`` table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from alignkit.components import Resume
from alignkit.config import model_kwargs, training_args, unused_settings
from alignkit.config.resolve import RunConfig, TopLevel

Path = tuple[str, ...]  # of a setting in `RunConfig.to_dict`


@dataclass(frozen=True)
class Change:
    """A setting whose value in a config differs from that in the record of a run."""

    path: Path
    before: Any
    after: Any
    resume: Resume

    @property
    def name(self) -> str:
        """The setting as on the command line: ``ppo.rollout.name``."""
        return ".".join(self.path).removeprefix("stages.")

    def __str__(self) -> str:
        return f"{self.name} was {self.before!r}, is {self.after!r}"

    @property
    def extends(self) -> bool:
        """Whether training may now take longer. None and ``max_steps=-1`` mean no limit."""
        if self.resume != "may_grow":
            return False
        return any(value is None or value < 0 for value in (self.before, self.after)) or self.after > self.before

    @property
    def allowed(self) -> bool:
        """Whether a resume accepts the change."""
        return self.resume == "may_change" or self.extends


def changes(record: Mapping[str, Any], config: RunConfig) -> list[Change]:
    """The differences between ``record``, a run's config in the shape of :meth:`RunConfig.to_dict`, and ``config``.

    A setting that did not exist yet when the run began counts as its default. A setting without effect in both does not
    count.
    """
    rules, defaults, stage = _rules(config), _defaults(config), config.stage.component
    train: Path = ("stages", stage.name, "train")
    if _rows_a_step(_at(record, train)) == _rows_a_step(config.train) and _rows_are_independent(config):
        rules |= {(*train, key): "may_change" for key in ROWS_A_STEP if key not in stage.resume}
    result = []
    for path, before, after in _differences(record, config.to_dict(), ()):
        before = defaults.get(path) if before is _ABSENT else before
        if before == after or _has_no_effect(path, config, record):
            continue
        setting = next((path[:n] for n in range(len(path), 0, -1) if path[:n] in rules), path)  # or its table
        result.append(Change(path, before, after, rules.get(setting, "same")))
    return result


ROWS_A_STEP = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}  # with the defaults of Transformers


def _rows_a_step(train: Mapping[str, Any]) -> int:
    return math.prod(train.get(key, default) for key, default in ROWS_A_STEP.items())


def _rows_are_independent(config: RunConfig) -> bool:
    """Whether microbatches of another size, as many as make the same step, only affect memory."""
    return not config.loss.component.compares_rows and not config.train.get("dataloader_drop_last")


def _has_no_effect(path: Path, config: RunConfig, record: Mapping[str, Any]) -> bool:
    """Whether a setting has an effect neither in ``config`` nor in ``record``."""
    table, name = path[:-1], path[-1]
    if table[-1:] == ("train",):
        return name in config.unused
    condition = next((field.metadata.get("only_with") for at, field, _ in _fields(config) if at == path), None)
    return condition is not None and not any(
        unused_settings.holds(condition, _at(each, table)) for each in (record, config.to_dict())
    )


def _at(table: Any, path: Path) -> Any:
    for key in path:
        table = table.get(key, {})
    return table


def _rules(config: RunConfig) -> dict[Path, Resume]:
    """The settings that a resume may change, each with its rule."""
    of_train = training_args.on_resume(config.train) | dict(config.stage.component.resume)
    rules: dict[Path, Resume] = {("stages", config.stage.component.name, "train", n): r for n, r in of_train.items()}
    rules |= {("model_kwargs", name): "may_change" for name in model_kwargs.PLACEMENT}
    for path, field, table in _fields(config):
        resume = field.metadata.get("resume", "same")
        resume = resume(table) if callable(resume) else resume
        if resume != "same":
            rules[path] = resume
    return rules


def _defaults(config: RunConfig) -> dict[Path, Any]:
    """The default of every setting that has one, as :meth:`RunConfig.to_dict` writes it."""
    from pydantic import TypeAdapter

    defaults = {}
    for path, field, _ in _fields(config):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if default is not dataclasses.MISSING:
            defaults[path] = TypeAdapter(Any).dump_python(default, mode="json")
    return defaults


def _fields(config: RunConfig) -> Iterator[tuple[Path, dataclasses.Field[Any], Any]]:
    """Every field of the config dataclasses, with the dataclass instance that has it."""
    stage: Path = ("stages", config.stage.component.name)
    tables: dict[Path, Any] = {(): TopLevel(), stage: config.stage.config, (*stage, "data"): config.data}
    for kind in ("tuner", "optimizer"):
        tables[(kind,)] = getattr(config, kind).config
    for kind in ("loss", *config.stage.component.uses):
        tables[*stage, kind] = getattr(config, kind).config
    for path, table in tables.items():
        yield from _of_table(path, table)


def _of_table(path: Path, table: Any) -> Iterator[tuple[Path, dataclasses.Field[Any], Any]]:
    """The fields of a config dataclass and of the dataclasses in it."""
    for field in dataclasses.fields(table):
        value = getattr(table, field.name)
        yield (*path, field.name), field, table
        if dataclasses.is_dataclass(value):
            yield from _of_table((*path, field.name), value)


_ABSENT = object()  # in a record: a setting that did not exist yet, or that is set only where it is used


def _differences(before: Any, after: Any, path: Path) -> Iterator[tuple[Path, Any, Any]]:
    if isinstance(after, Mapping) and (before is _ABSENT or isinstance(before, Mapping)):
        record: Mapping[str, Any] = before if isinstance(before, Mapping) else {}
        for key in dict.fromkeys([*record, *after]):
            yield from _differences(record.get(key, _ABSENT), after.get(key), (*path, key))
    elif before != after:
        yield path, before, after
