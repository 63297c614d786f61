"""Shell completion: names of plugins, and run folders. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

DEPTH = 3  # folders below the one that is typed
AT_MOST = 1000  # folders that are looked into, so that completion stays fast anywhere


def plugin_names(incomplete: str) -> list[tuple[str, str]]:
    """The installed plugins whose names begin so, with their summaries; then the components of built-in plugins."""
    from alignkit.components import KINDS
    from alignkit.registry import Registry

    registry = Registry()
    names = {plugin.name: "" if plugin.builtin else plugin.summary for plugin in registry.installed}
    for component in (each for kind in KINDS if kind != "judge" for each in registry.all(kind)):
        names[component.name] = names.get(component.name) or component.summary
    return [(name, summary) for name, summary in sorted(names.items()) if name.startswith(incomplete)]


def run_folders(incomplete: str) -> list[str]:
    """The runs below the folder that is typed so far, finished or not."""
    folder = os.path.dirname(incomplete)
    found = _runs(Path(os.path.expanduser(folder or ".")), DEPTH, [AT_MOST])
    home = os.path.expanduser("~")
    texts = (str(run).replace(home, "~", 1) if incomplete.startswith("~") else str(run) for run in found)
    return sorted(text for text in texts if text.startswith(incomplete))


def _runs(folder: Path, depth: int, left: list[int]) -> Iterator[Path]:
    try:
        inside = sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    except OSError:
        return
    for each in inside:
        left[0] -= 1
        if left[0] < 0:
            return
        if ((each / "config.yaml").exists() and (each / "checkpoints").exists()) or (each / "alignkit.json").exists():
            yield each
        elif depth > 1:
            yield from _runs(each, depth - 1, left)
