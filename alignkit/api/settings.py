"""Arguments of Python calls as the sources of settings that a command line has. No torch here."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple, TypeAlias

from alignkit import paths, yaml
from alignkit.api import row_files
from alignkit.components import Component, Stage
from alignkit.config.resolve import requested_stage
from alignkit.config.settings import merge
from alignkit.errors import ConfigError
from alignkit.generation import rewards
from alignkit.registry import Registry, in_memory
from alignkit.registry.checks import shown
from alignkit.registry.plugin import plugin_name

FilePath: TypeAlias = str | os.PathLike[str]
Data: TypeAlias = FilePath | Iterable[Any] | Mapping[str, Any]  # a path, rows or sources, or a `data` table
PluginLike: TypeAlias = object  # a name, a component, or an object or a module that implements hooks
RewardFunction: TypeAlias = Callable[..., Sequence[float]]  # of prompts and answers; see rankings.scorer


class Arguments(NamedTuple):
    """The plugins and the two sources of settings of a call, as those of a command."""

    registry: Registry
    file: dict[str, Any]  # the content of the config file
    given: dict[str, Any]  # the arguments, in the shape of a config file


def arguments(
    stage: str | Stage | None,
    model: FilePath | None,
    data: Data | None,
    plugins: Iterable[PluginLike],
    reward: str | Mapping[str, Any] | RewardFunction | Component | None,
    output: FilePath | None,
    config: FilePath | None,
    tables: Mapping[str, Any],
) -> Arguments:
    """The settings of a call. Rows are written to files in the output folder, which the settings name.

    Raises:
        AlignkitError: a plugin or a row cannot be used, or no stage is named.
    """
    file = dict(yaml.load(paths.expand(config))) if config is not None else {}
    folder = paths.expand(output or file.get("output") or "runs")
    named = plugin_names(plugins)
    given = plain(row_files.with_files(tables, folder))
    if callable(reward) or isinstance(reward, Component):
        named.append(name := reward_name(reward))
        reward = plugin_name(name)
    if reward is not None:
        given = merge({"reward": {"name": reward} if isinstance(reward, str) else plain(reward, "reward.")}, given)
    if stage is not None:
        named += plugin_names([stage])
    given |= plain({key: value for key, value in (("plugins", named), ("model", model), ("output", output)) if value})
    registry = Registry()
    if data is not None:
        table = row_files.with_files({"data": data}, folder)["data"]
        path = {"path": table.pop("path")} if "path" in table else {}
        requested = requested_stage(registry, file, given)
        given = merge(given, {"data": table} if table else {}, {"stages": {requested: {"data": path}} if path else {}})
    return Arguments(registry, file, given)


def plugin_names(plugins: Iterable[PluginLike]) -> list[str]:
    """The names of plugins in a config. Objects are registered in this process; a function is a reward function.

    Raises:
        PluginError: an object is not a plugin.
    """
    names = []
    for plugin in plugins if isinstance(plugins, Iterable) and not isinstance(plugins, str) else [plugins]:
        if isinstance(plugin, str):
            names.append(plugin)
        elif inspect.isfunction(plugin) and not plugin.__name__.startswith("alignkit_"):
            names.append(reward_name(plugin))
        else:
            names.append(in_memory.register(plugin))
    return names


def reward_name(reward: RewardFunction | Component) -> str:
    """The name of the plugin in memory that has a function or a component as its reward."""
    if isinstance(reward, Component):
        return in_memory.register(reward)
    return in_memory.register(rewards.of_function(reward), reward)


def plain(value: Any, where: str = "") -> Any:
    """Settings as a config file has them: paths are strings, tuples are lists, NumPy's scalars are numbers.

    ``where`` is the key of the settings in error messages, with a final point.

    Raises:
        ConfigError: a config file cannot have a value.
    """
    if isinstance(value, Mapping):
        return {key: plain(each, f"{where}{key}.") for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each, where) for each in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(each, where) for each in value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Enum):
        return plain(value.value, where)
    if getattr(value, "ndim", None) == 0:  # of NumPy or torch
        return value.item()
    if (type(value).__module__, type(value).__name__) == ("torch", "dtype"):
        return str(value).removeprefix("torch.")
    if value is None or isinstance(value, bool | int | float | str) or dataclasses.is_dataclass(value):
        return value
    raise ConfigError(f"{where.removesuffix('.')} is {shown(value)}. Give a number, a string, a list or a table")
