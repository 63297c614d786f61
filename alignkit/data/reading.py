"""Tell the format of raw rows; convert them; hold some out. Where they come from is in ``sources.py``.

No torch here: a bad row is found in the first second of a run, before anything is loaded.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from alignkit.components import DataFormat, NoConfig
from alignkit.config import DataConfig
from alignkit.config.resolve import named_format
from alignkit.config.settings import Selected
from alignkit.data.sources import RawRow, RawRows, open_source
from alignkit.data.spool import selected, stored
from alignkit.errors import DataError, one_line
from alignkit.registry import Registry, handover
from alignkit.rows import Located, Row


@dataclass(frozen=True)
class Rows:
    """The converted rows of one source."""

    source: str
    format: str
    rows: Sequence[Located]  # a list, or if they are many a file (see :mod:`alignkit.data.spool`)
    skipped: list[str]  # why, a line each; only with on_bad_row: skip
    fingerprint: str  # of the source's bytes
    empty: int = 0  # raw rows of which the format makes none
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
    """Read, recognise and convert the rows at ``path``; ``accepts`` are the row types that the stage trains on.

    Raises:
        DataError: nothing there, nothing in it, no or several formats fit, a bad row, or rows of another kind.
    """
    source = open_source(config, path)
    chosen, raw = _recognise(registry, config, path, source.rows)
    who = registry.describe(chosen.component)
    skipped: list[str] = []
    empty = 0

    def converted() -> Iterator[Located]:
        nonlocal empty
        for where, content in raw:
            try:
                made = _accepted(chosen, who, where, content, path, accepts)
            except DataError as error:
                if config.on_bad_row == "error" or isinstance(error, WrongKindError):
                    raise
                skipped.append(str(error))
            else:
                yield from made
                empty += not made

    rows = stored(converted())
    if not rows:
        name = chosen.component.name
        why = (
            f"all {len(skipped)} are bad, the first: {skipped[0]}" if skipped else f"format '{name}' makes none of them"
        )
        raise DataError(f"{path} has no rows to train on: {why}")
    settings = asdict(chosen.config)
    return Rows(path, chosen.component.name, rows, skipped, source.fingerprint, empty, source.left_out, settings)


def read(registry: Registry, config: DataConfig, path: str, accepts: tuple[type[Row], ...]) -> Iterator[Located]:
    """The rows at ``path`` one after another, none of them kept in memory; raises as :func:`load` at a bad row."""
    chosen, raw = _recognise(registry, config, path, open_source(config, path).rows)
    who = registry.describe(chosen.component)
    for where, content in raw:
        yield from _accepted(chosen, who, where, content, path, accepts)


class WrongKindError(DataError):
    """The rows are good, but not what is wanted."""


def _recognise(registry: Registry, config: DataConfig, path: str, raw: RawRows) -> tuple[Selected, RawRows]:
    """The format of the rows, with its settings, and the rows."""
    raw = itertools.starmap(_cleaned, raw)
    first = list(itertools.islice(raw, 20))
    chosen = named_format(registry, config.format)
    if chosen is None:
        recognised = _format(registry, path, first)
        chosen = Selected(recognised, recognised.config())
    return chosen, itertools.chain(first, raw)


def _cleaned(where: str, row: RawRow | DataError) -> tuple[str, RawRow | DataError]:
    """A row in which NaN, as pandas writes a missing cell, is None; a bad one where a text is no Unicode."""
    if isinstance(row, DataError):
        return where, row
    parts: list[Any] = list(row.items())  # no recursion: JSON may be nested as deep as Python's stack is
    while parts:
        part = parts.pop()
        if isinstance(part, Mapping):
            parts.extend(part.items())
        elif isinstance(part, list | tuple):
            parts.extend(part)
        elif isinstance(part, str):
            try:
                part.encode()
            except UnicodeEncodeError as error:
                half = f"half of a character, \\u{ord(part[error.start]):04x} (a lone surrogate)"
                near = part[max(0, error.start - 20) : error.start]
                return where, DataError(f"{where}: a text holds {half}, after {near!r}")
    return where, {key: None if value != value else value for key, value in row.items()}


def _accepted(
    chosen: Selected, who: str, where: str, content: RawRow | DataError, path: str, accepts: tuple[type[Row], ...]
) -> list[Located]:
    if isinstance(content, DataError):
        raise content
    rows = _convert(chosen, content, where, who)
    for row in rows:
        if not isinstance(row, accepts):
            wanted = " or ".join(_plural(t) for t in accepts)
            kind = f"{_plural(type(row))} (format '{chosen.component.name}')"
            raise WrongKindError(f"{path} holds {kind}; wanted are {wanted}")
    return [Located(where, row) for row in rows]


def _convert(chosen: Selected, row: RawRow, where: str, who: str) -> list[Row]:
    """The rows that a format makes of a raw one. Its settings are handed over where it has any."""
    component: DataFormat = chosen.component
    settings = () if component.config is NoConfig else (chosen.config,)
    try:
        converted = component.convert(row, *settings)
    except DataError as error:
        raise DataError(f"{where}: {error} (format '{component.name}' needs {component.summary})") from None
    except Exception as error:
        raise DataError(f"{where}: {who} failed on this row: {one_line(error)}") from error
    return handover.rows(f"{where}: {who}", converted)


def _format(registry: Registry, path: str, first: Sequence[tuple[str, RawRow | DataError]]) -> DataFormat:
    """The format that reads most fields of most of the first rows."""
    formats = {f.name: cast(DataFormat, f) for f in registry.all("format")}
    votes: Counter[tuple[str, ...]] = Counter()
    for where, row in first:
        if not isinstance(row, DataError):
            scores = {name: _fits(registry.describe(f, "fits"), f, row, where) for name, f in formats.items()}
            best = max(scores.values())
            votes[tuple(name for name in formats if scores[name] == best > 0)] += 1
    if not votes:  # nothing but bad rows, or none
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


def _fits(who: str, data_format: DataFormat, row: RawRow, where: str) -> int:
    try:
        fits = data_format.fits(row)
    except Exception as error:
        raise DataError(f"{where}: {who} failed on this row: {one_line(error)}") from error
    handover.expect(f"{where}: {who}", fits, isinstance(fits, int), "how many fields of the row it reads")
    return fits


def _plural(row_type: type) -> str:
    return row_type.__name__.lower() + "s"


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# --- held-out rows -------------------------------------------------------------------------------------------------


def hold_out(rows: Sequence[Located], size: float | None, seed: int) -> tuple[Sequence[Located], Sequence[Located]]:
    """Split rows into (training, held-out), reproducibly; rows with the same prompt stay on one side.

    ``size`` as in the config: below 1 a share, else a count, None for 10 % and at most 200. Prompts with many rows may
    make it more, but never more than twice as many: a prompt that would is trained on.

    Raises:
        DataError: no such size; no row would be left to train on, or none can be held out.
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
        raise DataError(f"holding out {wanted} of {len(rows)} rows leaves none to train on{why}. Set data.eval_size")
    if wanted and not taken:
        raise DataError(
            f"{wanted} of {len(rows)} rows cannot be held out: rows with one prompt stay together, and no prompt has "
            f"fewer than {(fewest := min(counts.values()))}. Set data.eval_size={-(-fewest // 2)} or more, or 0"
        )
    train = selected(rows, (index for index, group in enumerate(group_of) if group not in held))
    return train, selected(rows, (index for index, group in enumerate(group_of) if group in held))


def _groups(rows: Iterable[Located]) -> list[int]:
    """The group of each row: rows stay together that have the same key, or were made of the same raw row."""
    number_of: dict[bytes, int] = {}  # of a key
    joined: list[int] = []  # for each number, an earlier one that it stays with, or itself
    raw_row = "", 0  # where the last one stands, and the number of the first row made of it

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
