"""Adding to an error the name of the plugin that caused it."""

from __future__ import annotations

import traceback
from pathlib import Path

from alignkit.components import KINDS, Component
from alignkit.errors import one_line
from alignkit.registry.plugin import GROUP, Plugin, installed


def describe(plugin: Plugin | None, component: Component, function: str = "", which: str = "") -> str:
    """A component or one of its functions, for error messages.

    Such as ``"plugin focal (alignkit-focal 0.1): build of its loss 'focal'"``. Built-in plugins are not named.
    ``which`` distinguishes a component from others of the same name.
    """
    of = f"{function} of " if function else ""
    named = f"{component.kind} '{component.name}{which}'"
    return f"{of}{named}" if plugin is None or plugin.builtin else f"{plugin}: {of}its {named}"


def culprit(error: BaseException) -> str | None:
    """The message for an error that a third-party plugin raised, which names it. None for other errors.

    Such as ``"plugin focal (alignkit-focal 0.1) failed in focal.py line 8: KeyError: 'x'. Run again with ..."``.
    """
    by_module = {plugin.entry_point.module.split(".")[0]: plugin for plugin in installed() if not plugin.builtin}
    by_module.pop(GROUP, None)  # that of a component in memory, whose class is alignkit's
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if plugin := by_module.get(str(frame.f_globals.get("__name__")).split(".")[0]):
            remedy = other_version(plugin, error) or "Run again with --debug for the traceback"
            return f"{plugin} failed in {Path(frame.f_code.co_filename).name} line {line}: {one_line(error)}. {remedy}"
    return None


def other_version(plugin: Plugin, error: BaseException) -> str | None:
    """Advice if a plugin uses names of alignkit, or fields of its components, that do not exist. Else None."""
    lacks_name = isinstance(error, ImportError) and str(error.name).split(".")[0] == GROUP
    lacks_field = isinstance(error, TypeError) and str(error).startswith(tuple(_CONSTRUCTORS))
    if not lacks_name and not lacks_field:
        return None
    return f"It is written for another version of alignkit. {upgrade(plugin)}"


_CONSTRUCTORS = [f"{kind.__name__}.__init__()" for kind in KINDS.values()]


def upgrade(plugin: Plugin) -> str:
    """Advice about a plugin for another version of alignkit."""
    return f"To upgrade both: pip install -U alignkit {plugin.distribution}. Or run without --plugin {plugin.name}"
