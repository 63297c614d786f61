"""Rejects settings without an effect, so that nobody assumes that they have one.

They are declared in these places:

- ``Stage.refuses`` and ``Optimizer.refuses``: keys of ``train`` without an effect in a stage or with an optimizer.
- ``option(..., only_with=...)``: settings of a component that have an effect only with another one.
- ``training_args.ONLY_WITH``: the same for keys of ``train``.
- ``training_args.REFUSED``: keys of ``train`` that no stage accepts. They are errors like unknown keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from alignkit.errors import ConfigError


def holds(condition: str, values: Mapping[str, Any]) -> bool:
    """Whether ``values`` meet a condition: ``"key"`` for any value except null, false and 0, or ``"key=value"``."""
    name, equals, value = condition.partition("=")
    actual = values.get(name)
    return str(actual).lower() == value if equals else actual not in (None, False)


def without_unused(
    train: Mapping[str, Any], own: Collection[str], refuses: Mapping[str, str], where: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Split a ``train`` table into keys with an effect, and keys without one -> what to set instead.

    Args:
        own: keys that were set for ``where`` only. Others may have been set for another stage of the command.

    Raises:
        ConfigError: one of ``own`` has no effect.
    """
    unused = {}
    for condition, instead in refuses.items():
        name = condition.partition("=")[0]
        if holds(condition, train):
            if name in own:
                raise ConfigError(f"train.{condition} has no effect in {where}: {instead}")
            unused[name] = instead
    return {name: value for name, value in train.items() if name not in unused}, unused


def effective(cls: type, values: Mapping[str, Any], stated: Collection[str]) -> dict[str, Any]:
    """``values`` of a config dataclass without settings that have no effect, except those that the user ``stated``.

    Such a setting comes from a recipe or from the record of an earlier version, which the user need not know.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    unused = [
        field.name
        for field in dataclasses.fields(cls)
        if field.name not in stated
        and (condition := field.metadata.get("only_with"))
        and not holds(condition, {**defaults, **values})
    ]
    return {name: value for name, value in values.items() if name not in unused}


def check_only_with(values: Mapping[str, Any], only_with: Mapping[str, tuple[str, ...]], table: str) -> None:
    """Check that each setting in ``only_with`` meets one of the conditions with which it has an effect.

    Raises:
        ConfigError: a setting meets none.
    """
    for name, conditions in only_with.items():
        if not any(holds(condition, values) for condition in conditions):
            raise ConfigError(f"{table}{name} has no effect without {table}{conditions[0]}")


def check_config(config: Any, table: str) -> None:
    """:func:`check_only_with` for the fields of a config dataclass that differ from their defaults.

    Raises:
        ConfigError: a field has no effect, or its ``only_with`` does not name a field.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    only_with = {}
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(value := values[field.name]):
            check_config(value, f"{table}{field.name}.")
        condition = field.metadata.get("only_with")
        if condition is None:
            continue
        if condition.partition("=")[0] not in values:
            raise ConfigError(f"{table}{field.name}: only_with is {condition}, but {table[:-1]} has no such setting")
        default = field.default_factory() if callable(field.default_factory) else field.default
        if value != default:
            only_with[field.name] = (condition,)
    check_only_with(values, only_with, table)
