"""What plugins hand over, checked where it is handed over: an error names plugin, value, and what was expected.

Importing this module imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from alignkit.components import Component
from alignkit.errors import PluginError
from alignkit.plugin import Plugin


def expect(who: str, what: str, value: Any, right: bool, expected: str) -> None:
    """Whether a value that a plugin gave is right.

    ``who`` is the plugin (see :func:`who`), ``what`` the hook or the function that gave it.

    Raises:
        PluginError: it is not.
    """
    if not right:
        hint = ". Is a `return` missing?" if value is None else ""
        raise PluginError(f"{who}: {what} gave {shown(value)}, expected {expected}{hint}")


def shown(value: Any) -> str:
    """A value in an error: itself where it is short, else its type."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"a {type(value).__name__}"


def declared_components(plugin: Plugin, hook: str, kind: type[Component], given: Any) -> Iterator[Component]:
    """The components that a declaration hook gave, each looked at.

    Raises:
        PluginError: no list of components of that kind, or a field of another type than it must have.
    """
    right = isinstance(given, list | tuple) and all(isinstance(each, kind) for each in given)
    expect(str(plugin), hook, given, right, f"a list of {kind.__name__}")
    for component in given:
        for name, expected in _wrong_fields(component):
            value = shown(getattr(component, name))
            of = f"{component.kind} '{component.name}'"
            raise PluginError(f"{plugin}: the {name} of {of} is {value}, expected {expected}")
        yield component


def _wrong_fields(component: Component) -> Iterator[tuple[str, str]]:
    """Fields of a component that cannot be used: (name, what was expected)."""
    if not (isinstance(component.config, type) and dataclasses.is_dataclass(component.config)):
        yield "config", "a dataclass"
    for field in dataclasses.fields(component):
        value, kind = getattr(component, field.name), str(field.type)
        if value is None and kind.endswith("| None"):
            continue
        if kind.startswith("Callable") and not callable(value):
            yield field.name, "a function"
        elif kind.startswith("str") and not isinstance(value, str):
            yield field.name, "a text"
        elif kind.startswith("tuple") and not isinstance(value, tuple | list):
            yield field.name, "a tuple (with a comma after a single item)"
        elif kind.startswith("Mapping") and not isinstance(value, dict):
            yield field.name, "a dict"
