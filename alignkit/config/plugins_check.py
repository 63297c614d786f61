"""Checks installed plugins. Each is imported in a separate process, so that it cannot affect the others.

That process runs ``python -m alignkit.config.plugins_check NAME DISTRIBUTION FILE`` and writes its report to the file
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
from alignkit.components import Component, Judge, Reward, Stage
from alignkit.errors import AlignkitError, PluginError, did_you_mean, one_line, suggestion
from alignkit.registry import Registry
from alignkit.registry.plugin import Plugin, installed, plugin_name

HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
TIMEOUT = 300  # seconds, for the import of a plugin


@dataclass
class Checked:
    """A plugin, its components, and its problems, one line each."""

    plugin: Plugin
    gives: list[tuple[str, str]] = field(default_factory=list)  # (kind, name)
    problems: list[str] = field(default_factory=list)


def named(name: str) -> list[Plugin]:
    """The installed plugins with that ``name``, ``name@distribution``, or distribution.

    Raises:
        PluginError: there is none.
    """
    plugins, distribution = installed(), name.partition("@")[2]
    matches = [p for p in plugins if p.name == plugin_name(name) and p.is_from(distribution or p.distribution)]
    matches = matches or [p for p in plugins if p.is_from(name)]
    if not matches:
        known = [p.name for p in plugins]
        hint = did_you_mean(name, known)
        raise PluginError(f"no plugin named '{name}' is installed.{hint} Installed: {', '.join(known)}")
    return matches


def check(plugins: list[Plugin]) -> Iterator[Checked]:
    """Check each plugin, and whether the names of their components conflict."""
    providers: dict[tuple[str, str], list[Plugin]] = defaultdict(list)
    for plugin in installed():
        providers["plugin", plugin.name].append(plugin)
    results = [_check_in_subprocess(plugin) for plugin in plugins]
    for result in results:
        for kind, name in result.gives:
            providers[kind, name].append(result.plugin)
    for result in results:
        for kind, name in [("plugin", result.plugin.name), *result.gives]:
            others = [other.provider for other in providers[kind, name] if other != result.plugin]
            if others and not result.plugin.builtin:
                verb = "provides" if len(others) == 1 else "provide"
                result.problems.append(
                    f"{' and '.join(others)} also {verb} {kind} '{name}'. To select this one, use --plugin "
                    f"{name}@{result.plugin.distribution}"
                )
        yield result


def _check_in_subprocess(plugin: Plugin) -> Checked:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        here = os.pathsep.join(entry for entry in sys.path if entry)
        command = [sys.executable, "-P", "-m", __name__, plugin.name, plugin.distribution, str(file)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TIMEOUT, env={**os.environ, "PYTHONPATH": here}
            )
        except subprocess.TimeoutExpired:
            return Checked(plugin, problems=[f"its import did not finish within {TIMEOUT} s"])
        if not file.exists():
            last = (done.stderr.strip().splitlines() or ["nothing on standard error"])[-1]
            return Checked(plugin, problems=[f"its import ended the process with status {done.returncode}: {last}"])
        report = json.loads(file.read_text(encoding="utf-8"))
        return Checked(plugin, [(kind, name) for kind, name in report["gives"]], report["problems"])


# --- in the subprocess -----------------------------------------------------------------------------------------------


def _check(plugin: Plugin) -> Checked:
    """Import and activate a plugin along with the built-in ones, and check its hooks and components."""
    result, registry = Checked(plugin), None
    builtin = [p for p in installed() if p.builtin and p.name != plugin.name]
    with _watched_imports(plugin.entry_point.module.split(".")[0]) as heavy:
        try:
            registry = Registry([*builtin, plugin])
            registry.activate(plugin.name)
        except PluginError as error:
            result.problems.append(re.sub(rf"^{re.escape(str(plugin))}:? ", "", str(error)))
    if heavy:
        packages, seconds = ", ".join(name for name, _, _ in heavy), sum(spent for _, _, spent in heavy)
        result.problems.append(
            f"{packages} imported at module level ({heavy[0][1]}), which adds {seconds:.1f} s to every command with "
            "this plugin. Import inside the functions that need it"
        )
    if registry and plugin in registry.active:
        result.gives = [(component.kind, component.name) for component in registry.components_of(plugin)]
        if isinstance(module := plugin.entry_point.load(), ModuleType):
            result.problems += _unmarked(module, registry.hooks_of(plugin))
        for component in registry.components_of(plugin):
            result.problems += _problems_of(component, registry)
    return result


def _unmarked(module: ModuleType, marked: list[str]) -> Iterator[str]:
    hooks = [name for name in vars(hookspecs) if name.startswith("alignkit_")]
    for name, value in vars(module).items():
        if name.startswith("alignkit_") and name not in marked and getattr(value, "__module__", "") == module.__name__:
            problem = "lacks @alignkit.hookimpl" if name in hooks else suggestion("is not a hook", name, hooks)
            yield f"{name} {problem}"


def _problems_of(component: Component, registry: Registry) -> Iterator[str]:
    """Problems that would otherwise appear only when the component is used."""
    from alignkit.config.resolve import resolve
    from alignkit.config.settings import check_defaults

    who = f"{component.kind} '{component.name}'"
    if not re.fullmatch(r"[\w-]+", component.name):
        yield f"{who}: a name may contain only letters, digits, '-' and '_'"
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
    has_path = bool({"path", "paths"} & set(names))
    if isinstance(component, Reward | Judge) and component.needs(component.config()) and not has_path:
        yield f"{who}: it needs a run, so its config must have a field `path: str | None`"
    if isinstance(component, Reward):
        for field, value in (("parts", component.parts), ("judge", component.judge)):
            if value and value not in names:
                yield f"{who}: `{field}` is `{value}`, but its config has no such field"
    if isinstance(component, Judge):
        largest = component.largest(component.config())
        if not (largest is None or (type(largest) is int and largest > 1)):
            yield f"{who}: `largest` returns {largest!r}, expected None or 2 or more"


@contextlib.contextmanager
def _watched_imports(by: str) -> Iterator[list[tuple[str, str, float]]]:
    """Record the heavy packages that ``by``, a top-level module, imports: (package, file and line, seconds)."""
    imports: list[tuple[str, str, float]] = []
    original, inside = builtins.__import__, [False]

    def watched(name: str, *arguments: Any, **keywords: Any) -> Any:
        package = name.split(".")[0]
        if package not in HEAVY or package in sys.modules or inside[0]:
            return original(name, *arguments, **keywords)
        frames = [frame for frame, _ in traceback.walk_stack(sys._getframe(1))]
        frame = next((f for f in frames if str(f.f_globals.get("__name__")).split(".")[0] == by), frames[0])
        started, inside[0] = time.perf_counter(), True
        try:
            return original(name, *arguments, **keywords)
        finally:
            inside[0] = False
            where = f"{Path(frame.f_code.co_filename).name} line {frame.f_lineno}"
            imports.append((package, where, time.perf_counter() - started))

    builtins.__import__ = watched
    try:
        yield imports
    finally:
        builtins.__import__ = original


def main(name: str, distribution: str, file: str) -> None:
    """Check one plugin and write the report."""
    (plugin,) = (p for p in installed() if p.name == name and p.distribution == distribution)
    try:
        result = _check(plugin)
    except Exception as error:
        result = Checked(plugin, problems=[f"the check failed: {one_line(error)}"])
    Path(file).write_text(json.dumps({"gives": result.gives, "problems": result.problems}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
