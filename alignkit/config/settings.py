"""A component's settings: its table in a config file, as a typed instance of its config dataclass, and back."""

from __future__ import annotations

import copy
import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from alignkit.components import Component, Stage
from alignkit.config import training_args
from alignkit.errors import ConfigError, did_you_mean, one_line
from alignkit.registry import Registry


class Selected(NamedTuple):
    """A component that was picked, with its table."""

    component: Any  # a Component; Any spares a cast at every use
    config: Any  # an instance of component.config

    def to_dict(self) -> dict[str, Any]:
        """Its table in a config file."""
        return {"name": self.component.name, **plain(self.config)}


def select(registry: Registry, kind: str, name: str, tables: Iterable[Mapping[str, Any]], where: str = "") -> Selected:
    """The component that the last table names, with its keys; keys of another that it replaces are left behind.

    ``where`` is the key of the table in error messages, if that is not ``kind``.
    """
    component, own = registry.get(kind, name), dict[str, Any]()
    for table in tables:
        if table.get("name", component.name) != component.name:
            if not isinstance(table["name"], str):
                raise ConfigError(f"{kind}.name must be a name, not {table['name']!r}")
            former, component = component, registry.get(kind, table["name"])
            left = set(names(former.config)) - set(names(component.config))
            own = {key: value for key, value in own.items() if key not in left}
        own = merge(own, {key: value for key, value in table.items() if key != "name"})
    return Selected(component, typed(component.config, own, f"{where or kind}."))


def typed(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """An instance of a config dataclass, every value of its field's type.

    Raises:
        ConfigError: an unknown key, also in a nested dataclass; a value of another type; ``cls`` cannot be a config.
    """
    from pydantic import TypeAdapter, ValidationError  # here: `--help` does without
    from pydantic.errors import PydanticUserError

    known_keys(values, names(cls), where)
    try:
        config: Any = TypeAdapter(cls).validate_python(dict(values))
    except PydanticUserError as error:
        raise ConfigError(f"{cls.__module__}.{cls.__name__} is no config: {one_line(error)}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}{key}: {first['msg']} (got {first['input']!r})") from None
    _nested_keys(values, plain(config), where)
    return config


def plain(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON and YAML hold it: nested dataclasses are tables, paths are text, tuples are lists."""
    from pydantic import TypeAdapter

    return dict(TypeAdapter(type(config)).dump_python(config, mode="json"))


def nested(cls: type, field: str) -> type | None:
    """The dataclass that a field of a config dataclass holds, if it holds one."""
    hint = typing.get_type_hints(cls)[field]
    return next((each for each in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(each)), None)  # type: ignore[return-value]


def type_text(hint: Any) -> str:
    """A type of a config field as a person reads it: ``"float > 0"``, ``"error | skip"``, ``"str | null"``."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
        limits = [(sign, getattr(mark, name, None)) for mark in inner[1:] for name, sign in signs.items()]
        within = " and ".join(f"{sign} {limit}" for sign, limit in limits if limit is not None)
        return f"{type_text(inner[0])} {within}".strip()
    if origin is typing.Literal:
        return " | ".join(map(str, inner))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(type_text, inner))
    if hint is type(None):
        return "null"
    if inner:
        return f"{type_text(origin)}[{', '.join(map(type_text, inner))}]"
    return str(getattr(hint, "__name__", hint))


def check_defaults(component: Component) -> None:
    """Whether a component's config has defaults of its own types, and a stage's those of ``TrainingArguments``.

    Raises:
        ConfigError: a field without a default or of another type; a field of no type that can be checked.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(component.config) if f.default is not dataclasses.MISSING}
    typed(component.config, defaults, "config.")
    if isinstance(component, Stage):
        training_args.check(component.train)


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """One mapping from several, the later wins; nested mappings are merged, everything else is replaced."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = merged.get(key)
            if isinstance(value, Mapping):
                merged[key] = merge(old if isinstance(old, Mapping) else {}, value)
            else:
                merged[key] = copy.deepcopy(value)
    return merged


def as_table(value: Any, key: str) -> Mapping[str, Any]:
    """``value``, which must be a table or nothing."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} must be a table, not {value!r}")
    return value


def names(cls: type) -> list[str]:
    """The names of a dataclass's fields."""
    return [f.name for f in dataclasses.fields(cls)]


def known_keys(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Whether all keys are known.

    Raises:
        ConfigError: one is not, with the closest known one.
    """
    for key in values:
        if key not in known:
            raise ConfigError(
                f"unknown key {where}{key}.{did_you_mean(key, known)} Known here: {', '.join(sorted(known)) or 'none'}"
            )


def _nested_keys(given: Any, taken: Any, where: str) -> None:
    """Keys of nested dataclasses: Pydantic drops those that it does not know."""
    if isinstance(given, Mapping) and isinstance(taken, Mapping):
        known_keys(given, list(taken), where)
        for key, value in given.items():
            _nested_keys(value, taken[key], f"{where}{key}.")
    elif isinstance(given, list) and isinstance(taken, list):
        for number, (one, other) in enumerate(zip(given, taken, strict=False)):
            _nested_keys(one, other, f"{where}{number}.")
