"""Plugins in memory: objects, components and functions of a Python session that no distribution provides.

Every registry that is created afterwards in this process knows them. A config names one as
``NAME@in-memory-FINGERPRINT``, so a plugin whose code has changed is another one.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any, cast

from alignkit.components import Component
from alignkit.errors import PluginError
from alignkit.hookspecs import hookimpl
from alignkit.registry import code
from alignkit.registry.plugin import GROUP, IN_MEMORY, Plugin, in_memory, installed, registered
from alignkit.registry.registry import DECLARATIONS, Registry

DIGITS = 12  # of a fingerprint


@dataclass(frozen=True)
class PluginInMemory(Plugin):
    """A plugin that is an object in this process."""

    implementation: Any = field(compare=False)
    source: str | None = field(compare=False)  # the source of the object, if it is known

    @property
    def provider(self) -> str:
        return "in memory"

    @property
    def remedy(self) -> str:
        return "Change it and pass it again, or leave it out"

    def load(self) -> Any:
        return self.implementation


def register(value: Any, function: Callable[..., Any] | None = None) -> str:
    """Make a plugin known to this process, and return its name for ``plugins`` in a config.

    Args:
        value: a component, a hook, or an object or a module that implements hooks. The module of an installed plugin is
            that plugin.
        function: the user's function that a component was made for. Its code and source are recorded then.

    Raises:
        PluginError: a plugin of that name is installed; ``value`` implements no hook.
    """
    if isinstance(value, Component):
        name, hooks = value.name, {DECLARATIONS[value.kind]: hookimpl(cast(Any, lambda: [value]))}
        parts = vars(value) if function is None else {"name": name, "function": function}
        fingerprint = code.fingerprint({"kind": value.kind, **parts})
        implementation: Any = SimpleNamespace(**hooks)
    elif inspect.isfunction(value) and hasattr(value, f"{GROUP}_impl"):  # a hook
        name, hooks = value.__name__, {value.__name__: value}
        fingerprint, implementation = code.fingerprint(hooks), SimpleNamespace(**hooks)
    else:
        name = str(getattr(value, "__name__", type(value).__name__)).rpartition(".")[2]
        hooks = {hook: getattr(value, hook) for hook in dir(value) if hook.startswith("alignkit_")}
        fingerprint, implementation = code.fingerprint(hooks), value
    for plugin in installed():
        if isinstance(plugin, PluginInMemory):
            continue
        if plugin.entry_point.module == getattr(value, "__name__", None) and value is sys.modules.get(value.__name__):
            return f"{plugin.name}@{plugin.distribution}"
        if plugin.name == name and not plugin.builtin:
            raise PluginError(f"{plugin} is installed. Give the object in memory another name, or uninstall the plugin")
    if not hooks:
        raise PluginError(
            f"{name} is not a plugin: it implements no hook. Pass a name, a component such as alignkit.Reward, or an "
            "object with functions marked by @alignkit.hookimpl"
        )
    entry_point = EntryPoint(name, str(getattr(value, "__module__", None) or name), GROUP)
    distribution = IN_MEMORY + fingerprint[:DIGITS]
    written = code.source(function or value)
    plugin = PluginInMemory(name, distribution, "", entry_point, implementation, written)
    registered[name, distribution] = plugin
    return f"{name}@{distribution}"


def activate_known(registry: Registry, names: Iterable[str]) -> None:
    """Activate the plugins of a run, without those in memory that this process has not registered.

    Raises:
        PluginError: another plugin is not installed.
    """
    for name in names:
        with contextlib.suppress(PluginError) if in_memory([name]) else contextlib.nullcontext():
            registry.activate(name)


def sources(plugins: Iterable[Plugin]) -> dict[str, dict[str, str | None]]:
    """The manifest's record of the plugins in memory among ``plugins``, by name: the fingerprint and the source.

    A second plugin of the same name is under its name and distribution.
    """
    found = dict[str, dict[str, str | None]]()
    for plugin in plugins:
        if isinstance(plugin, PluginInMemory):
            name = f"{plugin.name}@{plugin.distribution}" if plugin.name in found else plugin.name
            found[name] = {"fingerprint": plugin.distribution.removeprefix(IN_MEMORY), "source": plugin.source}
    return found
