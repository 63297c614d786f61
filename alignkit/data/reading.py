"""Detects the format of raw rows, converts them, and holds some out. ``sources.py`` reads the raw rows.

This module does not import torch: a bad row is reported in the first second, before anything is loaded.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from alignkit.components import DataFormat, NoConfig
from alignkit.config import DataConfig
from alignkit.config.resolve import named_format
from alignkit.config.settings import Selected
from alignkit.data.sources import RawRow, RawRows, open_source
from alignkit.data.spool import selected, stored
from alignkit.errors import DataError, one_line
from alignkit.registry import Registry, checks
from alignkit.rows import Located, Row


@dataclass(frozen=True)
class Rows:
    """The converted rows of one source."""

    source: str
    format: str
    rows: Sequence[Located]  # a list, or a file if they are many (see :mod:`alignkit.data.spool`)
    skipped: list[str]  # why rows were skipped, a line each; only with on_bad_row: skip
    fingerprint: str  # a hash of the source's bytes
    empty: int = 0  # raw rows that the format converts to no row
    left_out: list[str] = field(default_factory=list)  # files of the folder that are not read
    settings: dict[str, Any] = field(default_factory=dict)  # of the format

    def describe(self) -> str:
        """``"490 rows from x.jsonl (format prompt-completion)"``."""
        settings = "".join(f", {name}={value}" for name, value in self.settings.items())
        skipped = f", {len(self.skipped)} bad rows skipped" if self.skipped else ""
        empty = f", {self.empty} rows of the source give none" if self.empty else ""
        left_out = f"; not read: {_shortened(self.left_out)}" if self.left_out else ""
        return f"{len(self.rows)} rows from {self.source} (format {self.format}{settings}{skipped}{empty}){left_out}"


def load(registry: Registry, config: DataConfig, path: str, accepts: tuple[type[Row], ...]) -> Rows:
    """Read the rows at ``path``, detect their format and convert them. ``accepts`` are the row types of the stage.

    Raises:
        DataError: there is nothing at ``path``, or it is empty; no format fits, or several do; a row is bad, or of
            another type.
    """
    source = open_source(config, path)
    chosen, raw = _recognise(registry, config, path, source.rows)
    component_name = registry.describe(chosen.component)
    skipped: list[str] = []
    empty = 0

    def good() -> Iterator[Located]:
        nonlocal empty
        for where, content in raw:
            try:
                converted = _accepted(chosen, component_name, where, content, path, accepts)
            except DataError as error:
                if config.on_bad_row == "error" or isinstance(error, WrongKindError):
                    raise
                skipped.append(str(error))
            else:
                yield from converted
                empty += not converted

    rows = stored(good())
    if not rows:
        name = chosen.component.name
        why = (
            f"all {len(skipped)} are bad. The first: {skipped[0]}" if skipped else f"format '{name}' makes none of them"
        )
        raise DataError(f"{path} has no rows to train on: {why}")
    settings = asdict(chosen.config)
    return Rows(path, chosen.component.name, rows, skipped, source.fingerprint, empty, source.left_out, settings)


def read(registry: Registry, config: DataConfig, path: str, accepts: tuple[type[Row], ...]) -> Iterator[Located]:
    """The rows at ``path``, one at a time. At a bad row, it raises the error of :func:`load`."""
    chosen, raw = _recognise(registry, config, path, open_source(config, path).rows)
    component_name = registry.describe(chosen.component)
    for where, content in raw:
        yield from _accepted(chosen, component_name, where, content, path, accepts)


class WrongKindError(DataError):
    """The rows are not of a type that the stage trains on."""


def _recognise(registry: Registry, config: DataConfig, path: str, raw: RawRows) -> tuple[Selected, RawRows]:
    """The format of the rows with its settings, and an iterator over all rows."""
    raw = itertools.starmap(_cleaned, raw)
    first = list(itertools.islice(raw, 20))
    chosen = named_format(registry, config.format)
    if chosen is None:
        recognised = _format(registry, path, first)
        chosen = Selected(recognised, recognised.config())
    return chosen, itertools.chain(first, raw)


def _cleaned(where: str, row: RawRow | DataError) -> tuple[str, RawRow | DataError]:
    """The row with None for NaN, which is what pandas writes for a missing cell; an error if a text is not Unicode."""
    if isinstance(row, DataError):
        return where, row
    parts: list[Any] = list(row.items())  # no recursion: JSON can be nested as deeply as Python's stack allows
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            parts += part.keys()
            parts += part.values()
        elif isinstance(part, list | tuple):
            parts += part
        elif isinstance(part, str) and not part.isascii():
            try:
                part.encode()
            except UnicodeEncodeError as error:
                half = f"half of a character, \\u{ord(part[error.start]):04x} (a lone surrogate)"
                near = part[max(0, error.start - 20) : error.start]
                return where, DataError(f"{where}: a text holds {half}, after {near!r}")
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


def _format(registry: Registry, path: str, first: Sequence[tuple[str, RawRow | DataError]]) -> DataFormat:
    """The format that reads the most fields of the most of the first rows."""
    formats = {f.name: cast(DataFormat, f) for f in registry.all("format")}
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
        raise DataError(f"{path}: several formats fit ({', '.join(names)}). Pick one with data.format=NAME")
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
    return row_type.__name__.lower() + "s"


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# --- held-out rows -------------------------------------------------------------------------------------------------


def hold_out(rows: Sequence[Located], size: float | None, seed: int) -> tuple[Sequence[Located], Sequence[Located]]:
    """Split rows into training rows and held-out rows, reproducibly. Rows with the same prompt stay together.

    ``size`` is that of the config: a share if below 1, else a count; None is 10 %, at most 200. A prompt with many rows
    can increase the number of held-out rows, but at most to twice ``size``: a prompt with more is trained on.

    Raises:
        DataError: the size is invalid, no row would be left to train on, or no row can be held out.
    """
    if size is not None and not 0 <= size < float("inf"):
        raise DataError(f"data.eval_size must be a share or a count (got {size:g})")
    share = 0.1 if size is None else size
    wanted = round(share * len(rows)) if share < 1 else int(min(share, len(rows)))
    if size is None:
        wanted = min(wanted, 200)
    group_of = _groups(rows)
    counts = Counter(group_of)
    groups = list(counts)
    random.Random(seed).shuffle(groups)
    held: set[int] = set()
    taken = 0
    for group in groups:
        if taken >= wanted:
            break
        if taken + counts[group] <= 2 * wanted or counts[group] == len(rows):
            held.add(group)
            taken += counts[group]
    if taken >= len(rows):
        why = "" if len(groups) > 1 else " (rows with one prompt stay together, and all have the same)"
        raise DataError(f"holding out {wanted} of {len(rows)} rows leaves none to train on{why}. Lower data.eval_size")
    if wanted and not taken:
        raise DataError(
            f"{wanted} of {len(rows)} rows cannot be held out: rows with one prompt stay together, and no prompt has "
            f"fewer than {(fewest := min(counts.values()))}. Set data.eval_size={-(-fewest // 2)} or more, or 0"
        )
    train = selected(rows, (index for index, group in enumerate(group_of) if group not in held))
    return train, selected(rows, (index for index, group in enumerate(group_of) if group in held))


def _groups(rows: Iterable[Located]) -> list[int]:
    """The group of each row. Rows with the same key are in one group, and so are rows from the same raw row."""
    number_of: dict[bytes, int] = {}  # key -> its number
    joined: list[int] = []  # number -> an earlier number of the same group, or itself
    raw_row = "", 0  # the location of the last raw row, and the number of its first row

    def first(number: int) -> int:
        while joined[number] != number:
            number = joined[number]
        return number

    numbers = []
    for where, row in rows:
        key = hashlib.blake2b(row.key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        number = number_of.setdefault(key, len(joined))
        if number == len(joined):
            joined.append(number)
        numbers.append(number)
        if where == raw_row[0]:
            earlier, later = sorted((first(number), first(raw_row[1])))
            joined[later] = earlier
        else:
            raw_row = where, number
    return [first(number) for number in numbers]
