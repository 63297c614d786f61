"""Fingerprints and source of objects in memory, such as a reward function that a notebook defines.

A fingerprint covers the code of functions, and the plain values, functions and classes that they use: defaults,
variables of enclosing functions, and global names. Regular expressions, paths, dates, decimals and NumPy's scalars are
plain values too.
Other objects of libraries, such as a loaded model, count by their type.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import operator
import re
import sys
import textwrap
import types
from collections import ChainMap, defaultdict, deque
from collections.abc import Iterator, Mapping, MutableMapping
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PurePath
from typing import Any

_BY_REPR = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray, range),
    *(PurePath, date, time, timedelta, Decimal, Fraction),
)


def fingerprint(values: Mapping[str, Any]) -> str:
    """A hash of named values and of the code in their modules that they use. It depends on the version of Python."""
    modules = {"__main__", *(str(getattr(value, "__module__", "")) for value in values.values())}
    reader = _Reader({module for module in modules if module.partition(".")[0] != "alignkit"})
    parts = [part for name, value in values.items() for part in (name, *reader.parts(value))]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def source(value: Any) -> str | None:
    """The source of a function, a class or a module, or of the class of another object; None if it is not known."""
    shown = value if inspect.isroutine(value) or isinstance(value, type | types.ModuleType) else type(value)
    try:
        return textwrap.dedent(inspect.getsource(shown))
    except (OSError, TypeError):
        return None


class _Reader:
    def __init__(self, modules: set[str], seen: MutableMapping[int, Any] | None = None) -> None:
        self.modules = modules  # whose functions and classes are read; those of others count by name
        self.seen = {} if seen is None else seen  # by id; the values stay alive, so that no id is used again

    def parts(self, value: Any) -> Iterator[str]:
        """Texts that differ if the value does."""
        if type(value).__module__ in self.modules:
            yield from self.parts(type(value))
        if isinstance(value, _BY_REPR) or _is_numpy_scalar(value):
            yield repr(value)
        elif isinstance(value, re.Pattern):
            yield f"{value.pattern!r} {value.flags}"
        elif isinstance(value, Enum) and type(value).__module__ not in self.modules:
            yield f"{type(value).__qualname__} {value.name}"
        elif id(value) in self.seen:
            return
        elif isinstance(value, set | frozenset):
            seen = {**self.seen, id(value): value}
            yield from sorted(" ".join(_Reader(self.modules, ChainMap({}, seen)).parts(item)) for item in value)
        else:
            self.seen[id(value)] = value
            yield from self._of_object(value)

    def _of_object(self, value: Any) -> Iterator[str]:
        inner: Any = ()
        if isinstance(value, types.CodeType):
            yield f"{value.co_argcount} {value.co_kwonlyargcount} {value.co_flags} {value.co_code.hex()}"
            inner = (value.co_names, value.co_varnames, value.co_consts)
        elif isinstance(value, types.MethodType):
            inner = (value.__func__, value.__self__)
        elif isinstance(value, functools.partial | functools.partialmethod):
            inner = (value.func, value.args, value.keywords)
        elif isinstance(value, Mapping):
            inner = [each for item in value.items() for each in item]
            if isinstance(value, defaultdict):
                inner.append(value.default_factory)
        elif isinstance(value, list | tuple | deque):
            inner = value
        else:
            yield f"{getattr(value, '__module__', '')} {getattr(value, '__qualname__', type(value).__qualname__)}"
            inner = list(self._members(value))
        for each in inner:
            yield from self.parts(each)

    def _members(self, value: Any) -> Iterator[Any]:
        if isinstance(value, types.FunctionType):
            if value.__module__ in self.modules:
                yield from (value.__code__, value.__defaults__, value.__kwdefaults__, _closure(value))
                used = _names(value.__code__) & value.__globals__.keys()
                yield {name: value.__globals__[name] for name in sorted(used)}
                yield [vars(value).get(name) for name in ("__wrapped__", "registry")]  # singledispatch has a registry
        elif isinstance(value, staticmethod | classmethod):
            yield value.__func__
        elif isinstance(value, property):
            yield (value.fget, value.fset, value.fdel)
        elif isinstance(value, functools.cached_property):
            yield value.func
        elif isinstance(value, functools.singledispatchmethod):
            yield value.dispatcher
        elif isinstance(value, operator.attrgetter | operator.itemgetter | operator.methodcaller):
            yield value.__reduce__()
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        elif not isinstance(value, types.ModuleType) and getattr(value, "__module__", "") in self.modules:
            yield _attributes(value)
            if isinstance(value, type):
                yield value.__bases__


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object or a class; of special ones, such as ``__init__``, those that are code."""
    descriptors = [item for cls in type(value).__mro__ for item in vars(cls).items()]
    slots = [name for name, each in descriptors if isinstance(each, types.MemberDescriptorType)]
    cached = [name for name, each in descriptors if isinstance(each, functools.cached_property)]
    attributes = {name: getattr(value, name, None) for name in slots} | dict(getattr(value, "__dict__", {}))
    return {
        name: each
        for name, each in attributes.items()
        if name not in cached
        and (not name.startswith("__") or callable(each) or isinstance(each, classmethod | property))
    }


def _is_numpy_scalar(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.generic)


def _closure(function: types.FunctionType) -> list[Any]:
    """The values of the variables of enclosing functions, without those that are not assigned yet."""
    cells = function.__closure__ or ()
    return [cell.cell_contents for cell in cells if cell != types.CellType()]


def _names(code: types.CodeType) -> set[str]:
    """The global names and attributes that a function and the functions in it use."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))
