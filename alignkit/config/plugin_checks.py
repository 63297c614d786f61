"""What is wrong with installed plugins. Each is imported in a process of its own, so that it harms no other.

``python -m alignkit.config.plugin_checks NAME DISTRIBUTION FILE`` is that process. It writes its report into the file,
as JSON.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from alignkit import hookspecs
from alignkit.components import Component, Reward, Stage
from alignkit.errors import AlignkitError, PluginError, did_you_mean, one_line
from alignkit.registry import Registry
from alignkit.registry.plugin import Plugin, bare, installed

HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
SECONDS = 300  # that an import may take


@dataclass
class Checked:
    """A plugin, what it gives, and what is wrong with it, a line each."""

    plugin: Plugin
    gives: list[tuple[str, str]] = field(default_factory=list)  # (kind, name)
    problems: list[str] = field(default_factory=list)


def named(name: str) -> list[Plugin]:
    """The installed plugins that ``name``, ``name@distribution`` or the name of a distribution means.

    Raises:
        PluginError: none.
    """
    found, distribution = installed(), name.partition("@")[2]
    meant = [p for p in found if p.name == bare(name) and p.is_from(distribution or p.distribution)]
    if not meant:
        meant = [p for p in found if p.is_from(name)]
    if not meant:
        known = [p.name for p in found]
        hint = did_you_mean(name, known)
        raise PluginError(f"no plugin named '{name}' is installed.{hint} Installed: {', '.join(known)}")
    return meant


def check(plugins: list[Plugin]) -> Iterator[Checked]:
    """Look at each plugin, and at whether the names that they give clash."""
    givers: dict[tuple[str, str], list[Plugin]] = defaultdict(list)
    for plugin in installed():
        givers["plugin", plugin.name].append(plugin)
    results = [_in_its_own_process(plugin) for plugin in plugins]
    for result in results:
        for kind, name in result.gives:
            givers[kind, name].append(result.plugin)
    for result in results:
        for kind, name in [("plugin", result.plugin.name), *result.gives]:
            others = [other.provider for other in givers[kind, name] if other != result.plugin]
            if others and not result.plugin.builtin:
                pick = f"--plugin {name}@{result.plugin.distribution} picks this one"
                result.problems.append(f"{kind} '{name}' is given by {' and '.join(others)} too: {pick}")
        yield result


def _in_its_own_process(plugin: Plugin) -> Checked:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        here = os.pathsep.join(entry for entry in sys.path if entry)
        command = [sys.executable, "-P", "-m", __name__, plugin.name, plugin.distribution, str(file)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=SECONDS, env={**os.environ, "PYTHONPATH": here}
            )
        except subprocess.TimeoutExpired:
            return Checked(plugin, problems=[f"its import was not done after {SECONDS} s"])
        if not file.exists():
            last = (done.stderr.strip().splitlines() or ["nothing on standard error"])[-1]
            return Checked(plugin, problems=[f"its import ended the process with status {done.returncode}: {last}"])
        report = json.loads(file.read_text(encoding="utf-8"))
        return Checked(plugin, [(kind, name) for kind, name in report["gives"]], report["problems"])


# --- in its own process ----------------------------------------------------------------------------------------------


def _look_at(plugin: Plugin) -> Checked:
    """Import and activate one plugin beside the built-in ones, and look at what it declares."""
    result, registry = Checked(plugin), None
    beside = [p for p in installed() if p.builtin and p.name != plugin.name]
    with _watched_imports(plugin.entry_point.module.split(".")[0]) as heavy:
        try:
            registry = Registry([*beside, plugin])
            registry.activate(plugin.name)
        except PluginError as error:
            result.problems.append(re.sub(rf"^{re.escape(str(plugin))}:? ", "", str(error)))
    if heavy:
        what, seconds = ", ".join(name for name, _, _ in heavy), sum(spent for _, _, spent in heavy)
        result.problems.append(
            f"{what} imported at module level ({heavy[0][1]}): {seconds:.1f} s of every command that names the plugin. "
            "Import inside the functions that need it"
        )
    if registry and plugin in registry.active:
        result.gives = [(component.kind, component.name) for component in registry.given_by(plugin)]
        if isinstance(module := plugin.entry_point.load(), ModuleType):
            result.problems += _unmarked(module, registry.hooks_of(plugin))
        for component in registry.given_by(plugin):
            result.problems += _wrong(component, registry)
    return result


def _unmarked(module: ModuleType, marked: list[str]) -> Iterator[str]:
    hooks = [name for name in vars(hookspecs) if name.startswith("alignkit_")]
    for name, value in vars(module).items():
        if name.startswith("alignkit_") and name not in marked and getattr(value, "__module__", "") == module.__name__:
            known = "lacks @alignkit.hookimpl" if name in hooks else f"is no hook.{did_you_mean(name, hooks)}"
            yield f"{name} {known}"


def _wrong(component: Component, registry: Registry) -> Iterator[str]:
    """What would be told only when the component is used."""
    from alignkit.config.resolve import resolve
    from alignkit.config.settings import check_defaults

    who = f"{component.kind} '{component.name}'"
    if not re.fullmatch(r"[\w-]+", component.name):
        yield f"{who}: a name is letters, digits, '-' and '_'"
    if not component.summary or "\n" in component.summary:
        yield f"{who}: its summary must be one line"
    try:
        check_defaults(component)
        if isinstance(component, Stage):
            resolve(registry, {"plugins": [component.name]}, {})
    except AlignkitError as error:
        yield f"{who}: {error}"
        return
    names = [field.name for field in dataclasses.fields(component.config)]
    if isinstance(component, Reward):
        if component.needs(component.config()) and not {"path", "paths"} & set(names):
            yield f"{who}: it needs a run, so its config needs a field `path: str | None`"
        if component.parts and component.parts not in names:
            yield f"{who}: its config has no field `{component.parts}`, which `parts` names"


@contextlib.contextmanager
def _watched_imports(by: str) -> Iterator[list[tuple[str, str, float]]]:
    """What is imported of the heavy packages meanwhile, by a line of ``by`` in the end: (package, where, seconds)."""
    found: list[tuple[str, str, float]] = []
    plain, inside = builtins.__import__, [False]

    def watched(name: str, *arguments: Any, **keywords: Any) -> Any:
        package = name.split(".")[0]
        if package not in HEAVY or package in sys.modules or inside[0]:
            return plain(name, *arguments, **keywords)
        frames = [frame for frame, _ in traceback.walk_stack(sys._getframe(1))]
        frame = next((f for f in frames if str(f.f_globals.get("__name__")).split(".")[0] == by), frames[0])
        started, inside[0] = time.perf_counter(), True
        try:
            return plain(name, *arguments, **keywords)
        finally:
            inside[0] = False
            where = f"{Path(frame.f_code.co_filename).name} line {frame.f_lineno}"
            found.append((package, where, time.perf_counter() - started))

    builtins.__import__ = watched
    try:
        yield found
    finally:
        builtins.__import__ = plain


def main(name: str, distribution: str, file: str) -> None:
    """Look at one plugin and write the report."""
    (plugin,) = (p for p in installed() if p.name == name and p.distribution == distribution)
    try:
        result = _look_at(plugin)
    except Exception as error:
        result = Checked(plugin, problems=[f"it cannot be looked at: {one_line(error)}"])
    Path(file).write_text(json.dumps({"gives": result.gives, "problems": result.problems}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
