"""``alignkit plugins``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from alignkit.cli import common
from alignkit.components import Component
from alignkit.config.plugins_check import Checked, check, named
from alignkit.errors import PluginError
from alignkit.registry import Registry
from alignkit.registry.plugin import Plugin, installed, plugin_name
from alignkit.registry.registry import DECLARATIONS


def plugins(
    words: list[str] = typer.Argument(
        None, metavar="[check] NAME", help="A plugin or component to describe; after `check`, plugins to check."
    ),
    as_json: bool = common.Json,
) -> None:
    """List, describe or check the installed plugins.

    \b
    alignkit plugins             list them
    alignkit plugins lora        describe a plugin with all its settings
    alignkit plugins adamw_8bit  describe a component
    alignkit plugins check lora  check a plugin; without a name, all of them
    """
    words = words or []
    if words[:1] == ["check"]:
        selected = [plugin for name in words[1:] for plugin in named(name)] if words[1:] else installed()
        show_checked(list(check(selected)), as_json)
    elif words and as_json:
        common.print_json([entry for name in words for entry in described_json(name)])
    elif words:
        for name in words:
            typer.echo("\n".join(described(name)))
    else:
        show_installed(as_json)


def show_installed(as_json: bool) -> None:
    """Print one line per plugin. Third-party plugins are not imported, so their summary stands for their components."""
    registry = Registry()
    listed = [_entry(registry, plugin) for plugin in registry.installed]
    if as_json:
        common.print_json(listed)
        return
    for entry, start in zip(listed, _columns(registry.installed), strict=True):
        components = "; ".join(f"{kind} {', '.join(names)}" for kind, names in entry["gives"].items())
        fallback = f"for details: alignkit plugins {entry['name']}"
        typer.echo(f"{start}  {components or entry['summary'] or fallback}")


def _entry(registry: Registry, plugin: Plugin) -> dict[str, Any]:
    gives: dict[str, list[str]] = {}
    for component in registry.components_of(plugin):
        gives.setdefault(component.kind, []).append(component.name)
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "summary": plugin.summary,
        "builtin": plugin.builtin,
        "gives": gives,
    }


def described(name: str) -> Iterator[str]:
    """Describe a plugin, or a component by name: every setting with its default, help and type."""
    from alignkit.cli.config import fields_with_help

    for registry, plugin, components in _selected(name):
        yield f"{plugin.name}  {plugin.provider}  {'' if plugin.builtin else plugin.summary}".rstrip()
        for component in components:
            yield f"{component.kind} {component.name}: {component.summary}"
            yield from fields_with_help(component)
        if hooks := registry.run_hooks_of(plugin):
            yield f"run hooks: {', '.join(hooks)}"


def described_json(name: str) -> Iterator[dict[str, Any]]:
    """The output of :func:`described`, as an object per plugin."""
    from alignkit.cli.config import fields_as_json

    for registry, plugin, components in _selected(name):
        listed = [
            {"kind": each.kind, "name": each.name, "summary": each.summary, "settings": fields_as_json(each)}
            for each in components
        ]
        entry = _entry(registry, plugin)
        del entry["gives"]
        yield {**entry, "components": listed, "run_hooks": list(registry.run_hooks_of(plugin))}


def _selected(name: str) -> Iterator[tuple[Registry, Plugin, list[Component]]]:
    """The plugin ``name`` with all its components, or the plugins with components of that name, and these alone."""
    registry = Registry()
    try:
        registry.activate(name)
    except PluginError:
        providers = _inactive_providers_of(name)
        if not providers:
            raise
        registry.activate(*(f"{plugin.name}@{plugin.distribution}" for plugin in providers))
    name = plugin_name(name)
    named = [plugin for plugin in registry.active if plugin.name == name]
    components = [registry.get(kind, name) for kind in DECLARATIONS if registry.has(kind, name)]
    for plugin in named or dict.fromkeys(map(registry.provider, components)):
        provided: list[Component] = registry.components_of(plugin)
        yield registry, plugin, provided if named else [each for each in provided if each in components]


def _inactive_providers_of(name: str) -> list[Plugin]:
    """The third-party plugins with a component of that name. Each is imported in a separate process."""
    inactive = [plugin for plugin in installed() if not plugin.builtin]
    providers = [(result.plugin, [component for _, component in result.gives]) for result in check(inactive)]
    return [plugin for plugin, components in providers if plugin_name(name) in components]


def show_checked(results: list[Checked], as_json: bool = False) -> None:
    """Print one line per problem, or one per plugin without problems. Exit with status 1 if there are problems."""
    problems = sum(len(result.problems) for result in results)
    if as_json:
        listed = [
            {"name": r.plugin.name, "distribution": r.plugin.distribution, "problems": r.problems} for r in results
        ]
        common.print_json(listed)
    else:
        for result, start in zip(results, _columns([result.plugin for result in results]), strict=True):
            for problem in result.problems or ["ok"]:
                typer.echo(f"{start}  {problem}")
    if problems:
        raise typer.Exit(1)


def _columns(plugins: list[Plugin]) -> list[str]:
    """The names and the distributions of plugins, padded to columns."""
    name, provider = max(len(p.name) for p in plugins), max(len(p.provider) for p in plugins)
    return [f"{plugin.name:<{name}}  {plugin.provider:<{provider}}" for plugin in plugins]
