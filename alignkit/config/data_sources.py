"""The sources that ``data.path`` names: one path, or a list of paths and of tables with a path and a weight."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from annotated_types import Gt, Le

from alignkit import bundled, paths
from alignkit.components import option
from alignkit.config.settings import plain, typed
from alignkit.errors import ConfigError

DataPath: TypeAlias = str | list[str | dict[str, Any]] | None  # the type of `data.path`


@dataclass(frozen=True)
class DataSource:
    """An entry of ``data.path``."""

    path: str = option("", "a file (.jsonl .json .csv .parquet), a folder or a hub id")
    weight: Annotated[float, Gt(0), Le(1000)] = option(1.0, "how often an epoch has each training row of this source")
    name: str | None = option(None, "the subset of a hub dataset; null: data.name")
    split: str | None = option(None, "the split of a folder or a hub dataset; null: data.split")

    def written(self) -> str | dict[str, Any]:
        """The entry as the config writes it: a path, or a table if it has other settings."""
        defaults = plain(DataSource())
        others = {key: value for key, value in plain(self).items() if key != "path" and value != defaults[key]}
        return {"path": self.path, **others} if others else self.path


def parse(path: Any, key: str = "data.path") -> list[DataSource]:
    """The sources that a value of ``data.path`` names; none for None.

    Raises:
        ConfigError: the list is empty, an entry is invalid, or a source is named twice. ``key`` is for the message.
    """
    if path is None:
        return []
    if path == []:
        raise ConfigError(f"{key} is an empty list")
    entries = path if isinstance(path, list) else [path]
    sources = [_source(entry, f"{key}[{number}]" if path is entries else key) for number, entry in enumerate(entries)]
    seen = set()
    for source in sources:
        place = source.path if source.path.startswith(bundled.PREFIX) else os.path.normpath(paths.expand(source.path))
        if (place, source.name, source.split) in seen:
            raise ConfigError(f"{key} names {source.path} twice. To train on it more often, set its weight")
        seen.add((place, source.name, source.split))
    return sources


def _source(entry: Any, where: str) -> DataSource:
    if isinstance(entry, str):
        return DataSource(entry)
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where} must be a path, a table with a path, or a list of them, not {entry!r}")
    source: DataSource = typed(DataSource, entry, f"{where}.")
    if "path" not in entry:
        raise ConfigError(f"{where} has no path")
    return source


def normalized(path: Any) -> DataPath:
    """``data.path`` as the config of a run writes it: one path if that is all it says, else a list.

    Raises:
        ConfigError: see :func:`parse`.
    """
    written = [source.written() for source in parse(path)]
    if not written:
        return None
    return written[0] if len(written) == 1 and isinstance(written[0], str) else written
