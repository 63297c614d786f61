"""``alignkit plugins``: list them, describe one, check them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import typer

from alignkit.components import Component
from alignkit.config.plugin_checks import Checked, check, named
from alignkit.errors import PluginError
from alignkit.registry import Registry
from alignkit.registry.plugin import Plugin, bare, installed
from alignkit.registry.registry import DECLARATIONS


def plugins(
    words: list[str] = typer.Argument(
        None, metavar="[check] NAME", help="A plugin or component to describe; after `check`, plugins to check."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
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
        found = [plugin for name in words[1:] for plugin in named(name)] if words[1:] else installed()
        show_checked(list(check(found)), as_json)
    elif words:
        for name in words:
            typer.echo("\n".join(described(name)))
    else:
        show_installed(as_json)


def show_installed(as_json: bool) -> None:
    """A line a plugin. Only the built-in ones are imported, so what a third party's gives is in its own words."""
    registry = Registry()
    listed = [_entry(registry, plugin) for plugin in registry.installed]
    if as_json:
        typer.echo(json.dumps(listed, indent=2))
        return
    for entry, start in zip(listed, _columns(registry.installed), strict=True):
        gives = "; ".join(f"{kind} {', '.join(names)}" for kind, names in entry["gives"].items())
        ask = f"`alignkit plugins {entry['name']}` describes it"
        typer.echo(f"{start}  {gives or entry['summary'] or ask}")


def _entry(registry: Registry, plugin: Plugin) -> dict[str, Any]:
    gives: dict[str, list[str]] = {}
    for component in registry.given_by(plugin):
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
    """All that a plugin gives, or a component by its name: every setting with its default, help and type."""
    from alignkit.cli.config import fields_with_help

    registry = Registry()
    try:
        registry.activate(name)
    except PluginError:
        givers = _givers_of(name)
        if not givers:
            raise
        registry.activate(*(f"{plugin.name}@{plugin.distribution}" for plugin in givers))
    named = [plugin for plugin in registry.active if plugin.name == bare(name)]
    components = [registry.get(kind, bare(name)) for kind in DECLARATIONS if registry.has(kind, bare(name))]
    for plugin in named or dict.fromkeys(map(registry.provider, components)):
        yield f"{plugin.name}  {plugin.provider}  {'' if plugin.builtin else plugin.summary}".rstrip()
        given: list[Component] = registry.given_by(plugin)
        for component in given if named else [c for c in given if c in components]:
            yield f"{component.kind} {component.name}: {component.summary}"
            yield from fields_with_help(component)
        runs = registry.run_hooks_of(plugin)
        if runs:
            yield f"run hooks: {', '.join(runs)}"


def _givers_of(name: str) -> list[Plugin]:
    """The plugins that are not active and give a component of that name; each is imported in a process of its own."""
    idle = [plugin for plugin in installed() if not plugin.builtin]
    return [result.plugin for result in check(idle) if bare(name) in [given for _, given in result.gives]]


def show_checked(results: list[Checked], as_json: bool = False) -> None:
    """A line a plugin, one more for each further problem; exit status 1 where there is any."""
    problems = sum(len(result.problems) for result in results)
    if as_json:
        listed = [
            {"name": r.plugin.name, "distribution": r.plugin.distribution, "problems": r.problems} for r in results
        ]
        typer.echo(json.dumps(listed, indent=2))
    else:
        for result, start in zip(results, _columns([result.plugin for result in results]), strict=True):
            for problem in result.problems or ["ok"]:
                typer.echo(f"{start}  {problem}")
    if problems:
        raise typer.Exit(1)


def _columns(found: list[Plugin]) -> list[str]:
    name, who = max(len(plugin.name) for plugin in found), max(len(plugin.provider) for plugin in found)
    return [f"{plugin.name:<{name}}  {plugin.provider:<{who}}" for plugin in found]
