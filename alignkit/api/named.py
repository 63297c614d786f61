"""Judges and scorers that Python calls name. No torch here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from alignkit import yaml
from alignkit.api.settings import FilePath, RewardFunction, plain, reward_name
from alignkit.components import Component
from alignkit.errors import ConfigError
from alignkit.registry import Registry
from alignkit.registry.checks import shown
from alignkit.registry.plugin import plugin_name


class Named(NamedTuple):
    """A judge or a scorer as the command line names it."""

    name: str
    settings: dict[str, Any]
    plugins: list[str]  # to activate: that of a function

    def overrides(self, plugins: Sequence[str], reward: bool = False) -> list[str]:
        """The settings as words of a command line. With ``reward``, they are not those of a judge."""
        registry = Registry()
        registry.activate(*plugins)
        kind = "judge" if registry.has("judge", self.name) and not reward else "reward"
        return [f"{kind}.{key}={yaml.dumps_inline(value)}" for key, value in self.settings.items()]


def named(value: FilePath | Mapping[str, Any] | RewardFunction | Component, key: str) -> Named:
    """The judge or the scorer that the argument ``key`` is: a name, a table with a name, a run or a function.

    Raises:
        ConfigError: a table has no name; it is something else.
    """
    if callable(value) or isinstance(value, Component):
        plugin = reward_name(value)
        return Named(plugin_name(plugin), {}, [plugin])
    if isinstance(value, Mapping):
        table = plain(value, f"{key}.")
        if not isinstance(name := table.pop("name", None), str):
            raise ConfigError(f"{key} is a table without a name")
        return Named(name, table, [])
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{key} is {shown(value)}. Give a name, a run, a table or a function")
    return Named(os.fspath(value), {}, [])
