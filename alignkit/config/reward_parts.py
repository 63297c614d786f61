"""Rewards that are made of other rewards, and the runs that they need. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from alignkit.config.settings import Selected, select
from alignkit.errors import ConfigError
from alignkit.registry import Registry, handover


class FindRun(Protocol):
    """Find the run that a reward needs: of the stage that makes it, the folder that was named, and the key it has."""

    def __call__(self, stage: str, role: str, named: str | None, key: str) -> str: ...


def part(registry: Registry, table: Mapping[str, Any], own: Collection[str] = (), key: str = "reward") -> Selected:
    """The reward that a table inside another reward's config names; ``own`` are keys of the table that are the other's.

    Raises:
        ConfigError: the table has no name, or a key or a value that the reward does not take.
        PluginError: no active plugin gives that reward.
    """
    if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
        raise ConfigError(f"{key} needs the name of a reward: {{name: NAME, ...}}")
    if "on_error" in table:
        raise ConfigError(f"{key}.on_error: this is a setting of the whole reward, reward.on_error")
    settings = {name: value for name, value in table.items() if name not in own}
    return select(registry, "reward", table["name"], [settings], key)


def with_parts(registry: Registry, reward: Selected, key: str = "reward") -> list[Selected]:
    """A reward and those that it is made of, at any depth.

    Raises:
        AlignkitError: as :func:`part`.
    """
    found = [reward]
    for table, where in _tables(reward, key):
        found += with_parts(registry, part(registry, table, reward.component.part_keys, where), where)
    return found


def stages_needed(registry: Registry, reward: Selected) -> dict[str, str]:
    """Role -> stage of the runs that a reward and its parts need and do not name."""
    needs: dict[str, str] = {}
    if getattr(reward.config, "path", None) is None and not getattr(reward.config, "paths", None):
        needs |= _needs(registry, reward)
        for table, where in _tables(reward, "reward"):
            needs |= stages_needed(registry, part(registry, table, reward.component.part_keys, where))
    return needs


def with_runs(
    registry: Registry, reward: Selected, find: FindRun, key: str = "reward", path: str | None = None
) -> Selected:
    """A reward with the folders of the runs that it and its parts need, and with every setting of its parts.

    A part that names no run of its own takes the ``path`` of the reward that it is in.

    Raises:
        AlignkitError: as :func:`part` and ``find``.
    """
    component, config = reward
    path = getattr(config, "path", None) or path
    tables = []
    for table, where in _tables(reward, key):
        inner = with_runs(registry, part(registry, table, component.part_keys, where), find, where, path)
        own = {name: table[name] for name in component.part_keys if name in table}
        settings = {name: value for name, value in inner.to_dict().items() if name != "on_error"}
        tables.append({**own, **settings})
    if component.parts:
        held = getattr(config, component.parts)
        config = dataclasses.replace(config, **{component.parts: tables if isinstance(held, list) else tables[0]})
    for role, stage in _needs(registry, Selected(component, config)).items():
        if several := getattr(config, "paths", None):
            folders = [find(stage, role, each, f"{key}.paths") for each in several]
            config = dataclasses.replace(config, paths=folders)
        else:
            config = dataclasses.replace(config, path=find(stage, role, path, f"{key}.path"))
    return Selected(component, config)


def _needs(registry: Registry, reward: Selected) -> Mapping[str, str]:
    component, config = reward
    return handover.needs(registry.who(component, "needs"), component.needs(config))


def _tables(reward: Selected, key: str) -> list[tuple[Mapping[str, Any], str]]:
    """The tables of a reward's parts, each with its key."""
    field = reward.component.parts
    if field is None:
        return []
    held = getattr(reward.config, field)
    if isinstance(held, list):
        return [(table, f"{key}.{field}[{number}]") for number, table in enumerate(held)]
    return [(held, f"{key}.{field}")]
