"""Rewards that consist of other rewards or ask a judge, and the runs that they need."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from alignkit.config.settings import Selected, select
from alignkit.errors import ConfigError
from alignkit.registry import Registry, checks


class FindRun(Protocol):
    """Finds a run that a reward needs, from its stage and role, the folder in the config, and the config key."""

    def __call__(self, stage: str, role: str, named: str | None, key: str) -> str: ...


def part(registry: Registry, table: Mapping[str, Any], own: Collection[str] = (), key: str = "reward") -> Selected:
    """The reward in a table of another reward's config. The keys in ``own`` belong to the other reward.

    Raises:
        ConfigError: the table has no name, an unknown key, or a value of the wrong type.
        PluginError: no active plugin provides that reward.
    """
    if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
        raise ConfigError(f"{key} must name a reward: {{name: NAME, ...}}")
    if "on_error" in table:
        raise ConfigError(f"{key}.on_error has no effect: set reward.on_error, which applies to the whole reward")
    settings = {name: value for name, value in table.items() if name not in own}
    return select(registry, "reward", table["name"], [settings], key)


def judge_of(registry: Registry, table: Mapping[str, Any], key: str) -> Selected:
    """The judge in a table of a reward's config.

    Raises:
        ConfigError: the table has no name, an unknown key, or a value of the wrong type.
        PluginError: no active plugin provides that judge.
    """
    if not isinstance(table.get("name"), str):
        known = ", ".join(judge.name for judge in registry.all("judge"))
        raise ConfigError(f"{key} must name a judge: set {key}.name. Judges: {known}")
    return select(registry, "judge", table["name"], [table], key)


def with_parts(registry: Registry, reward: Selected, key: str = "reward") -> list[Selected]:
    """A reward and its parts, at any depth.

    Raises:
        AlignkitError: as :func:`part`.
    """
    rewards = [reward]
    for table, where in _tables(reward, key):
        rewards += with_parts(registry, part(registry, table, reward.component.part_keys, where), where)
    return rewards


def with_judges(registry: Registry, reward: Selected) -> list[Selected]:
    """A reward, its parts at any depth, and the judges that they name.

    Raises:
        AlignkitError: as :func:`part` and :func:`judge_of`.
    """
    rewards = with_parts(registry, reward)
    asked = [getattr(config, component.judge) for component, config in rewards if component.judge]
    return [*rewards, *(judge_of(registry, table, "reward.judge") for table in asked if table.get("name"))]


def stages_needed(registry: Registry, reward: Selected) -> dict[str, str]:
    """The runs that a reward and its parts need but do not name, as role -> stage."""
    needs: dict[str, str] = {}
    if getattr(reward.config, "path", None) is None and not getattr(reward.config, "paths", None):
        needs |= _needs(registry, reward)
        for table, where in _tables(reward, "reward"):
            needs |= stages_needed(registry, part(registry, table, reward.component.part_keys, where))
    return needs


def with_runs(
    registry: Registry, reward: Selected, find: FindRun, key: str = "reward", path: str | None = None
) -> Selected:
    """A reward with the folders of the runs that it and its parts need, and with all settings of its parts and judge.

    A part without a ``path`` takes that of the reward that contains it.

    Raises:
        AlignkitError: as :func:`part` and ``find``.
    """
    component, config = reward
    path = getattr(config, "path", None) or path
    if component.judge:
        judge = judge_of(registry, getattr(config, component.judge), f"{key}.{component.judge}")
        config = dataclasses.replace(config, **{component.judge: judge.to_dict()})
    tables = []
    for table, where in _tables(reward, key):
        inner = with_runs(registry, part(registry, table, component.part_keys, where), find, where, path)
        own = {name: table[name] for name in component.part_keys if name in table}
        settings = {name: value for name, value in inner.to_dict().items() if name != "on_error"}
        tables.append({**own, **settings})
    if component.parts:
        value = getattr(config, component.parts)
        config = dataclasses.replace(config, **{component.parts: tables if isinstance(value, list) else tables[0]})
    for role, stage in _needs(registry, Selected(component, config)).items():
        if paths := getattr(config, "paths", None):
            folders = [find(stage, role, each, f"{key}.paths") for each in paths]
            config = dataclasses.replace(config, paths=folders)
        else:
            config = dataclasses.replace(config, path=find(stage, role, path, f"{key}.path"))
    return Selected(component, config)


def _needs(registry: Registry, reward: Selected) -> Mapping[str, str]:
    component, config = reward
    return checks.needs(registry.describe(component, "needs"), component.needs(config))


def _tables(reward: Selected, key: str) -> list[tuple[Mapping[str, Any], str]]:
    """The tables of the parts of a reward, each with its key."""
    field = reward.component.parts
    if field is None:
        return []
    value = getattr(reward.config, field)
    if isinstance(value, list):
        return [(table, f"{key}.{field}[{number}]") for number, table in enumerate(value)]
    return [(value, f"{key}.{field}")]
