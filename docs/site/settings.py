"""MkDocs hook: a page with every setting of alignkit and of the built-in components, and its default."""

from __future__ import annotations

import dataclasses
import html
import typing
from collections.abc import Iterator
from typing import Any

from mkdocs.structure.files import File, Files

from alignkit import yaml
from alignkit.config import DataConfig
from alignkit.config.resolve import TopLevel
from alignkit.config.settings import plain, type_text
from alignkit.registry import Registry

TABLES = {  # the kind of a component -> its section, and the table that holds its settings; a stage's has its own name
    "stage": ("Stages", ""),
    "tuner": ("Tuners", "tuner"),
    "optimizer": ("Optimizers", "optimizer"),
    "loss": ("Losses", "loss"),
    "reward": ("Rewards", "reward"),
    "judge": ("Judges", "judge"),
    "rollout": ("Rollout engines", "rollout"),
}
INTRODUCTION = """# All settings

Every setting of the built-in components, with its default. `alignkit config --plugin STAGE --plugin TUNER` prints those
that a command uses, also of other plugins, and the fields of `train`. [Configuration](../configuration.md) explains how
to set them.
"""


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, "api/settings.md", content="\n".join(_page())))
    return files


def _page() -> Iterator[str]:
    registry = Registry()
    components = [each for plugin in registry.active for each in registry.components_of(plugin)]
    yield INTRODUCTION
    yield "## Top level\n"
    yield from _table("", TopLevel)
    yield "\n## Data\n"
    yield from _table("data.", DataConfig)
    for kind, (title, table) in TABLES.items():
        yield f"\n## {title}\n"
        for component in components:
            if component.kind == kind:
                yield f"\n### {component.name}\n\n{component.summary}\n"
                yield from _table(f"{table or component.name}.", component.config)


def _table(prefix: str, config: type) -> Iterator[str]:
    """The fields of a config as a Markdown table, or nothing if it has none."""
    hints = typing.get_type_hints(config, include_extras=True)
    defaults = plain(config())
    if defaults:
        yield "| setting | default | values | description |\n|---|---|---|---|"
    for field in dataclasses.fields(config):
        default, values = yaml.dumps_inline(defaults[field.name]), type_text(hints[field.name])
        cells = (f"`{prefix}{field.name}`", f"`{default}`", f"`{values}`", _escaped(field.metadata.get("help", "")))
        yield f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Text for a cell of a table."""
    return html.escape(text, quote=False).replace("|", "&#124;")
