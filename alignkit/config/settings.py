"""Converts the settings of a component between its table in a config file and its typed config dataclass."""

from __future__ import annotations

import copy
import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from alignkit.components import Component, Stage
from alignkit.config import training_args, unused_settings
from alignkit.errors import ConfigError, did_you_mean, one_line
from alignkit.registry import Registry

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_adapters: dict[type, TypeAdapter[Any]] = {}


class Selected(NamedTuple):
    """A selected component with its settings."""

    component: Any  # a Component; Any spares a cast at every use
    config: Any  # an instance of component.config

    def to_dict(self) -> dict[str, Any]:
        """Its table in a config file."""
        return {"name": self.component.name, **plain(self.config)}


def select(registry: Registry, kind: str, name: str, tables: Iterable[Mapping[str, Any]], where: str = "") -> Selected:
    """The component that the last table names, with the settings of all tables.

    If a later table names another component, settings that it does not have are dropped, and all settings between a
    tuner that trains adapters and one that does not. ``where`` is the key of the
    table in error messages, if it is not ``kind``.
    """
    component, own = registry.get(kind, name), dict[str, Any]()
    for table in tables:
        if table.get("name", component.name) != component.name:
            if not isinstance(table["name"], str):
                raise ConfigError(f"{kind}.name must be a string, not {table['name']!r}")
            former, component = component, registry.get(kind, table["name"])
            dropped = set(names(former.config)) - set(names(component.config))
            if getattr(former, "adapters", None) != getattr(component, "adapters", None):
                dropped = set(own)  # `dtype` is that of trained weights in one tuner, and of the frozen base in another
            own = {key: value for key, value in own.items() if key not in dropped}
        own = merge(own, {key: value for key, value in table.items() if key != "name"})
    return Selected(component, typed(component.config, own, f"{where or kind}."))


def typed(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Make an instance of a config dataclass and check the types of its values.

    Raises:
        ConfigError: an unknown key, also in a nested dataclass; a value of the wrong type, or one that has no effect;
            ``cls`` cannot be a config.
    """
    from pydantic import ValidationError  # slow to import
    from pydantic.errors import PydanticUserError

    known_keys(values, names(cls), where)
    try:
        config: Any = _adapter(cls).validate_python(dict(values))
    except PydanticUserError as error:
        raise ConfigError(f"{cls.__module__}.{cls.__name__} cannot be a config: {one_line(error)}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}{key}: {first['msg']} (got {first['input']!r})") from None
    _check_nested(values, plain(config), where)
    unused_settings.check_config(config, where)
    return config


def plain(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON or YAML: nested dataclasses are tables, paths are strings, tuples are lists."""
    return dict(_adapter(type(config)).dump_python(config, mode="json"))


def _adapter(cls: type) -> TypeAdapter[Any]:
    """A config dataclass for pydantic, made once: it takes milliseconds."""
    from pydantic import TypeAdapter

    if cls not in _adapters:
        _adapters[cls] = TypeAdapter(cls)
    return _adapters[cls]


def nested(cls: type, field: str) -> type | None:
    """The dataclass that is the type of a config field, or None."""
    hint = typing.get_type_hints(cls)[field]
    return next((each for each in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(each)), None)  # type: ignore[return-value]


def type_text(hint: Any) -> str:
    """The type of a config field as text, such as ``"float > 0"``, ``"error | skip"`` or ``"str | null"``."""
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
    """Check the defaults of a component's config, and the ``train`` table of a stage.

    Raises:
        ConfigError: a field without a default, with a default of the wrong type, or with a type that cannot be checked.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(component.config) if f.default is not dataclasses.MISSING}
    typed(component.config, defaults, "config.")
    if isinstance(component, Stage):
        training_args.check(component.train)


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge mappings; later ones take precedence. Nested mappings are merged, other values are replaced."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = merged.get(key)
            if isinstance(value, Mapping):
                merged[key] = merge(old if isinstance(old, Mapping) else {}, value)
            else:
                merged[key] = copy.deepcopy(value)
    return merged


def texts(value: Any) -> set[str]:
    """All strings in nested tables and lists."""
    if isinstance(value, Mapping | list):
        inner = value.values() if isinstance(value, Mapping) else value
        return set[str]().union(*map(texts, inner))
    return {value} if isinstance(value, str) else set()


def as_table(value: Any, key: str) -> Mapping[str, Any]:
    """``value`` as a table; None is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} must be a table, not {value!r}")
    return value


def names(cls: type) -> list[str]:
    """The field names of a dataclass."""
    return [f.name for f in dataclasses.fields(cls)]


SHORT_LIST = 8  # keys that an error lists beside a suggestion


def known_keys(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Check that all keys are known.

    Raises:
        ConfigError: a key is unknown. The message suggests the closest known one.
    """
    for key in values:
        if key not in known:
            hint, valid = did_you_mean(key, known), sorted(known)
            if not hint or len(valid) <= SHORT_LIST:
                hint += f" Valid keys: {', '.join(valid) or 'none'}"
            raise ConfigError(f"unknown key {where}{key}.{hint}")


def _check_nested(given: Any, accepted: Any, where: str) -> None:
    """Check what Pydantic accepts: unknown keys of nested dataclasses, and booleans as numbers."""
    if isinstance(given, Mapping) and isinstance(accepted, Mapping):
        given = {str(key): value for key, value in given.items()}  # as those of `accepted`, which are JSON's
        known_keys(given, list(accepted), where)
        for key, value in given.items():
            _check_nested(value, accepted[key], f"{where}{key}.")
    elif isinstance(given, list) and isinstance(accepted, list):
        for number, (item, accepted_item) in enumerate(zip(given, accepted, strict=False)):
            _check_nested(item, accepted_item, f"{where}{number}.")
    elif isinstance(given, bool) and not isinstance(accepted, bool):
        raise ConfigError(f"{where.removesuffix('.')} must be a number, not {given!r}")
