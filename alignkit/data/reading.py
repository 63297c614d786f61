"""Detects the format of raw rows and converts them. ``sources.py`` reads the raw rows.

This module does not import torch: a bad row is reported in the first second, before anything is loaded.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from alignkit.components import DataFormat, NoConfig
from alignkit.config import DataConfig, data_sources
from alignkit.config.data_sources import DataPath, DataSource
from alignkit.config.resolve import named_format
from alignkit.config.settings import Selected
from alignkit.data.readers import RawRow, RawRows
from alignkit.data.row_cache import Converted, NotJson, Record, converted, file_for, joined
from alignkit.data.sources import open_source, with_folder
from alignkit.errors import DataError, one_line
from alignkit.registry import Registry, checks
from alignkit.rows import Located, Rated, Row

SAMPLED_FROM = "sampled_from"  # the field of a row with the model and the settings that sampled its answers


@dataclass(frozen=True)
class ReadSource:
    """A source, and what was read from it."""

    path: str
    format: str
    rows: int | None  # None for a stream, whose rows are not counted
    fingerprint: str  # a hash of its bytes; for a stream, of their number and of the first and last ones
    weight: float = 1.0
    skipped: int = 0  # bad rows; only with on_bad_row: skip
    empty: int = 0  # raw rows that the format converts to no row
    left_out: list[str] = field(default_factory=list)  # files of the folder that are not read
    settings: dict[str, Any] = field(default_factory=dict)  # of the format
    sampled_from: list[dict[str, Any]] = field(default_factory=list)  # see :func:`origin`, each once

    def describe(self) -> str:
        """``"490 rows from x.jsonl (format prompt-completion, weight 2)"``."""
        settings = "".join(f", {name}={value}" for name, value in self.settings.items())
        weight = f", weight {self.weight:g}" if self.weight != 1 else ""
        skipped = f", {self.skipped} bad rows skipped" if self.skipped else ""
        empty = f", {self.empty} rows of the source give none" if self.empty else ""
        left_out = f"; not read: {_shortened(self.left_out)}" if self.left_out else ""
        rows = "a stream" if self.rows is None else f"{self.rows} rows"
        return f"{rows} from {self.path} (format {self.format}{settings}{weight}{skipped}{empty}){left_out}"


@dataclass(frozen=True)
class Rows:
    """The converted rows of one or several sources, in their order, each once."""

    rows: Sequence[Located]  # a list, or a file if they are many (see :mod:`alignkit.data.spool`)
    sources: list[ReadSource]
    skipped: list[str]  # why rows were skipped, a line each; only with on_bad_row: skip

    @property
    def path(self) -> str:
        """The paths of the sources: ``"a.jsonl, b.jsonl"``."""
        return ", ".join(source.path for source in self.sources)

    @property
    def format(self) -> str:
        """The formats of the sources, each once: ``"ranking, preference"``."""
        return ", ".join(dict.fromkeys(source.format for source in self.sources))

    @property
    def fingerprint(self) -> str:
        """A hash of the bytes of all sources."""
        each = [source.fingerprint for source in self.sources]
        return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()

    def describe(self) -> list[str]:
        """A line for each source."""
        lines = [source.describe() for source in self.sources]
        if more := len(self.skipped) - sum(source.skipped for source in self.sources):
            lines.append(f"{more} bad rows skipped: the chat template or the reward rejects them")
        return lines

    def parts(self) -> Iterator[tuple[ReadSource, range]]:
        """Each source, and the indices of its rows."""
        start = 0
        for source in self.sources:
            assert source.rows is not None
            yield source, range(start, start + source.rows)
            start += source.rows


def load(registry: Registry, config: DataConfig, path: DataPath, accepts: tuple[type[Row], ...]) -> Rows:
    """Read the rows of ``path`` (see ``data.path``): detect the format of each source and convert its rows.

    ``accepts`` are the row types of the stage. Locations of rows name the folder too if there are several sources.

    Raises:
        DataError: there is nothing at a path, or it is empty; no format fits, or several do; a row is bad, or of
            another type.
    """
    sources = data_sources.parse(path)
    readers = [SourceReader(registry, config, source, accepts, several=len(sources) > 1) for source in sources]
    parts = [reader.convert() for reader in readers]
    skipped = [line for part in parts for line in part.skipped]
    read_sources = [reader.describe(part) for reader, part in zip(readers, parts, strict=True)]
    return Rows(joined([part.rows for part in parts]), read_sources, skipped)


class SourceReader:
    """Reads and converts one source. ``several`` is set if the run has others."""

    def __init__(
        self, registry: Registry, config: DataConfig, source: DataSource, accepts: tuple[type[Row], ...], several: bool
    ) -> None:
        self.registry, self.source, self.accepts, self.several = registry, source, accepts, several
        self.config = replace(config, name=source.name or config.name, split=source.split or config.split)
        self.open()

    def open(self) -> None:
        """Begin at the first row, and recognize the format."""
        self.opened = open_source(self.config, self.source.path)
        raw = self.opened.rows
        raw = with_folder(self.source.path, raw, self.source.split or "") if self.several else raw
        self.chosen, self.raw = _recognize(self.registry, self.config, self.source.path, raw, self.accepts)

    def convert(self) -> Converted:
        """Convert the rows, or read them from the file of an earlier start."""
        try:
            result = converted(self._records(), self._file())
        except NotJson:
            self.open()
            result = converted(self._records(), None)
        if not result.rows:
            why = f"format '{self.chosen.component.name}' makes none of them"
            if result.skipped:
                why = f"all {len(result.skipped)} are bad. The first: {result.skipped[0]}"
            raise DataError(f"{self.source.path} has no rows to train on: {why}")
        return result

    def accepted(self, where: str, content: RawRow | DataError) -> list[Located]:
        """The rows that the format makes of a raw row.

        Raises:
            DataError: the row is bad; :class:`WrongKindError` if the stage does not train on such rows.
        """
        component_name = self.registry.describe(self.chosen.component)
        return _accepted(self.chosen, component_name, where, content, self.source.path, self.accepts)

    def _records(self) -> Iterator[Record]:
        for where, content in self.raw:
            try:
                rows = self.accepted(where, content)
            except DataError as error:
                if self.config.on_bad_row == "error" or isinstance(error, WrongKindError):
                    raise
                yield Record(where, error=str(error))
            else:
                sampled_from = origin(cast(RawRow, content))
                written = json.dumps(sampled_from) if sampled_from else None
                made: list[Row | None] = [row for _, row in rows]
                yield from (Record(where, row, origin=written) for row in made or [None])
        self.opened.check_unchanged()

    def _file(self) -> Path | None:
        """The file for the converted rows, named by everything that they depend on; None if that is not known."""
        plugin = self.registry.provider(self.chosen.component)
        if not plugin.builtin or not self.opened.files:
            return None
        return file_for(
            code=["alignkit", plugin.entry_point.module],
            files=self.opened.files,
            fingerprint=self.opened.fingerprint,
            path=self.source.path,
            split=self.config.split,
            split_of_source=self.source.split,  # it is in the rows' locations, if there are several sources
            several=self.several,
            format=self.chosen.component.name,
            settings=asdict(self.chosen.config),
            accepts=[each.__name__ for each in self.accepts],
            on_bad_row=self.config.on_bad_row,
        )

    def describe(self, part: Converted | None = None) -> ReadSource:
        """The rows that were read, or that are read as a stream."""
        rows, part = (None, Converted([], [], 0, [])) if part is None else (len(part.rows), part)
        return ReadSource(
            path=self.source.path,
            format=self.chosen.component.name,
            rows=rows,
            fingerprint=self.opened.fingerprint,
            weight=self.source.weight,
            skipped=len(part.skipped),
            empty=part.empty,
            left_out=self.opened.left_out,
            settings=asdict(self.chosen.config),
            sampled_from=[json.loads(each) for each in part.origins],
        )


def origin(row: RawRow) -> dict[str, Any] | None:
    """The model that the answers of a row were sampled from, and the round of comparisons of them.

    ``alignkit sample`` writes them to the field ``sampled_from``. None if the row has none.
    """
    value = row.get(SAMPLED_FROM)
    if not isinstance(value, Mapping) or not isinstance(value.get("round"), int):
        return None
    return {key: value.get(key) for key in ("model", "weights", "round")}


def read(registry: Registry, config: DataConfig, path: str, accepts: tuple[type[Row], ...]) -> Iterator[Located]:
    """The rows at ``path``, one at a time. At a bad row, it raises the error of :func:`load`."""
    chosen, raw = _recognize(registry, config, path, open_source(config, path).rows, accepts)
    component_name = registry.describe(chosen.component)
    for where, content in raw:
        yield from _accepted(chosen, component_name, where, content, path, accepts)


class WrongKindError(DataError):
    """The rows are not of a type that the stage trains on."""


def _recognize(
    registry: Registry, config: DataConfig, path: str, raw: RawRows, accepts: tuple[type[Row], ...]
) -> tuple[Selected, RawRows]:
    """The format of the rows with its settings, and an iterator over all rows."""
    raw = itertools.starmap(_cleaned, raw)
    first = list(itertools.islice(raw, 20))
    chosen = named_format(registry, config.format)
    if chosen is None:
        recognized = _format(registry, path, first, accepts)
        chosen = Selected(recognized, recognized.config())
    return chosen, itertools.chain(first, raw)


def _cleaned(where: str, row: RawRow | DataError) -> tuple[str, RawRow | DataError]:
    """The row with None for NaN, which is what pandas writes for a missing cell."""
    if isinstance(row, DataError):
        return where, row
    return where, {key: None if value != value else value for key, value in row.items()}


def _accepted(
    chosen: Selected,
    component_name: str,
    where: str,
    content: RawRow | DataError,
    path: str,
    accepts: tuple[type[Row], ...],
) -> list[Located]:
    if isinstance(content, DataError):
        raise content
    rows = _convert(chosen, content, where, component_name)
    for row in rows:
        if not isinstance(row, accepts):
            wanted = " or ".join(_plural(t) for t in accepts)
            kind = f"{_plural(type(row))} (format '{chosen.component.name}')"
            raise WrongKindError(f"{path} contains {kind}; expected {wanted}")
    return [Located(where, row) for row in rows]


def _convert(chosen: Selected, row: RawRow, where: str, component_name: str) -> list[Row]:
    """The rows that a format makes of a raw row. Its settings are an argument if it has a config."""
    component: DataFormat = chosen.component
    settings = () if component.config is NoConfig else (chosen.config,)
    try:
        converted = component.convert(row, *settings)
    except DataError as error:
        raise DataError(f"{where}: {error} (format '{component.name}' needs {component.summary})") from None
    except Exception as error:
        raise DataError(f"{where}: {component_name} failed on this row: {one_line(error)}") from error
    return checks.rows(f"{where}: {component_name}", converted)


def _format(
    registry: Registry, path: str, first: Sequence[tuple[str, RawRow | DataError]], accepts: tuple[type[Row], ...]
) -> DataFormat:
    """The format that reads the most fields of the most of the first rows, of those that may make accepted rows."""
    known_formats = (cast(DataFormat, f) for f in registry.all("format"))
    formats = {f.name: f for f in known_formats if not f.rows or any(issubclass(row, accepts) for row in f.rows)}
    votes: Counter[tuple[str, ...]] = Counter()
    for where, row in first:
        if not isinstance(row, DataError):
            scores = {name: _fits(registry.describe(f, "fits"), f, row, where) for name, f in formats.items()}
            best = max(scores.values())
            votes[tuple(name for name in formats if scores[name] == best > 0)] += 1
    if not votes:  # no rows, or only bad ones
        for _, row in first:
            raise cast(DataError, row)
        raise DataError(f"{path} has no rows to train on: it is empty")
    names = max(votes, key=lambda names: (votes[names], len(names) == 1))
    if len(names) == 1:
        return formats[names[0]]
    if names:
        raise DataError(f"{path}: several formats fit ({', '.join(names)}). Choose one with data.format=NAME")
    fields = ", ".join(next(row for _, row in first if not isinstance(row, DataError)))
    known = "; ".join(f"{f.name}: {f.summary}" for f in formats.values())
    raise DataError(f"{path}: no format fits rows with the fields {fields or '(none)'}. Known: {known}")


def _fits(component_name: str, data_format: DataFormat, row: RawRow, where: str) -> int:
    try:
        fits = data_format.fits(row)
    except Exception as error:
        raise DataError(f"{where}: {component_name} failed on this row: {one_line(error)}") from error
    checks.expect(f"{where}: {component_name}", fits, isinstance(fits, int), "how many fields of the row it reads")
    return fits


def _plural(row_type: type) -> str:
    return "rated answers" if row_type is Rated else row_type.__name__.lower() + "s"


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
