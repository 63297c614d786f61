"""``alignkit plugins``."""

from __future__ import annotations

import json
from typing import Any

import typer

from alignkit.errors import PluginError
from alignkit.plugin import Plugin, installed
from alignkit.registry import Registry


def plugins(as_json: bool = typer.Option(False, "--json", help="For programs.")) -> None:
    """List every installed plugin and what it gives."""
    found = installed()
    builtin = [plugin for plugin in found if plugin.builtin]
    listed = [_describe(plugin, builtin) for plugin in found]
    if as_json:
        typer.echo(json.dumps(listed, indent=2))
        return
    name_width = max(len(entry["name"]) for entry in listed)
    who_width = max(len(f"{entry['distribution']} {entry['version']}") for entry in listed)
    for entry in listed:
        who = f"{entry['distribution']} {entry['version']}"
        gives = "; ".join(f"{kind} {', '.join(names)}" for kind, names in entry["gives"].items())
        what = f"broken: {entry['broken']}" if entry["broken"] else gives or "run hooks"
        typer.echo(f"{entry['name']:<{name_width}}  {who:<{who_width}}  {what}")


def _describe(plugin: Plugin, builtin: list[Plugin]) -> dict[str, Any]:
    """One plugin, activated beside the built-ins alone, so that a broken one disturbs no other."""
    gives: dict[str, list[str]] = {}
    broken = None
    try:
        registry = Registry([*builtin, *([] if plugin.builtin else [plugin])])
        registry.activate(plugin.name)
        for component in registry.given_by(plugin):
            gives.setdefault(component.kind, []).append(component.name)
    except PluginError as error:
        broken = str(error)
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "gives": gives,
        "broken": broken,
    }
