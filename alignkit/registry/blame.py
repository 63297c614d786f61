"""How an error gets the name of the plugin that caused it."""

from __future__ import annotations

import traceback
from pathlib import Path

from alignkit.components import Component
from alignkit.registry.plugin import Plugin, installed


def describe(plugin: Plugin | None, component: Component, function: str = "", which: str = "") -> str:
    """A component or one of its functions, for error messages.

    Such as ``"plugin focal (alignkit-focal 0.1): build of its loss 'focal'"``. Built-in plugins are not named.
    ``which`` distinguishes a component from others of the same name.
    """
    of = f"{function} of " if function else ""
    named = f"{component.kind} '{component.name}{which}'"
    return f"{of}{named}" if plugin is None or plugin.builtin else f"{plugin}: {of}its {named}"


def culprit(error: BaseException) -> str | None:
    """Which third-party plugin raised an error: ``"plugin focal (alignkit-focal 0.1) failed in focal.py line 8"``."""
    by_module = {plugin.entry_point.module.split(".")[0]: plugin for plugin in installed() if not plugin.builtin}
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if plugin := by_module.get(str(frame.f_globals.get("__name__")).split(".")[0]):
            return f"{plugin} failed in {Path(frame.f_code.co_filename).name} line {line}"
    return None
