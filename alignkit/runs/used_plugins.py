"""Checks that the plugins of a command line are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.config import layers
from alignkit.config.settings import texts
from alignkit.errors import ConfigError
from alignkit.registry import Registry
from alignkit.registry.plugin import plugin_name


def check(registry: Registry, cli: Mapping[str, Any], configs: Sequence[Mapping[str, Any]]) -> None:
    """Check that each plugin on the command line is used. In a config file it may be meant for another command.

    ``configs`` are those of the runs that the command trains or uses.

    Raises:
        ConfigError: no component of a plugin is used. The message lists its components.
    """
    used = texts([cli, *configs])
    for name in layers.plugins(cli):
        for plugin in registry.matches(name):
            provided = registry.components_of(plugin)
            names = {component.name for component in provided}
            automatic = registry.run_hooks_of(plugin) or any(component.kind == "format" for component in provided)
            if plugin_name(name) not in names and not names & used and not automatic:
                components = ", ".join(f"{component.kind} {component.name}" for component in provided)
                key = {"judge": "reward.judge"}.get(provided[0].kind, provided[0].kind) if provided else ""
                hint = f". Select one, such as {key}.name={provided[0].name}" if provided else ""
                raise ConfigError(f"{plugin} is not used. It provides {components or 'no components'}{hint}")
