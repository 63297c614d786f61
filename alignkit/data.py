"""Read rows from files, folders and the hub; tell their format; convert them; hold some out.

No torch here: a bad row is found in the first second of a run, before anything is loaded.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from alignkit import bundled
from alignkit.components import DataFormat
from alignkit.config import DataConfig
from alignkit.errors import DataError, did_you_mean, one_line
from alignkit.registry import Registry
from alignkit.rows import Row

RawRow = Mapping[str, Any]
Reader = Callable[[Path], Iterator[tuple[str, "RawRow | DataError"]]]


class Located(NamedTuple):
    """A row and where it stands, for messages: ``"prefs.jsonl line 17"``."""

    where: str
    row: Row


@dataclass(frozen=True)
class Rows:
    """The converted rows of one source."""

    source: str
    format: str
    rows: list[Located]
    skipped: list[str]  # why, a line each; only with on_bad_row: skip
    fingerprint: str  # of the source's bytes

    def describe(self) -> str:
        """``"490 rows from x.jsonl (format prompt-completion)"``."""
        skipped = f", {len(self.skipped)} bad rows skipped" if self.skipped else ""
        return f"{len(self.rows)} rows from {self.source} (format {self.format}{skipped})"


def load(registry: Registry, config: DataConfig, path: str, accepts: tuple[type[Row], ...]) -> Rows:
    """Read, recognise and convert the rows at ``path``; ``accepts`` are the row types that the stage trains on.

    Raises:
        DataError: nothing there, nothing in it, no or several formats fit, a bad row, or rows of another kind.
    """
    raw, fingerprint = _open(config, path)
    data_format, raw = _recognise(registry, config, path, raw)
    rows: list[Located] = []
    skipped: list[str] = []
    for where, content in raw:
        try:
            rows.append(Located(where, _accepted(data_format, where, content, path, accepts)))
        except DataError as error:
            if config.on_bad_row == "error" or isinstance(error, WrongKindError):
                raise
            skipped.append(str(error))
    if not rows:
        raise DataError(f"{path} has no rows to train on: all {len(skipped)} are bad, the first: {skipped[0]}")
    return Rows(path, data_format.name, rows, skipped, fingerprint)


def read(registry: Registry, config: DataConfig, path: str, accepts: tuple[type[Row], ...]) -> Iterator[Located]:
    """The rows at ``path`` one after another, none of them kept in memory; raises as :func:`load` at a bad row."""
    data_format, raw = _recognise(registry, config, path, _open(config, path)[0])
    for where, content in raw:
        yield Located(where, _accepted(data_format, where, content, path, accepts))


class WrongKindError(DataError):
    """The rows are good, but not what is wanted."""


def _recognise(
    registry: Registry, config: DataConfig, path: str, raw: Iterable[tuple[str, RawRow | DataError]]
) -> tuple[DataFormat, Iterator[tuple[str, RawRow | DataError]]]:
    raw = itertools.starmap(_cleaned, raw)
    first = list(itertools.islice(raw, 20))
    return _format(registry, config.format, path, first), itertools.chain(first, raw)


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
    data_format: DataFormat, where: str, content: RawRow | DataError, path: str, accepts: tuple[type[Row], ...]
) -> Row:
    if isinstance(content, DataError):
        raise content
    row = _convert(data_format, content, where)
    if not isinstance(row, accepts):
        wanted = " or ".join(_plural(t) for t in accepts)
        raise WrongKindError(f"{path} holds {_plural(type(row))} (format '{data_format.name}'); wanted are {wanted}")
    return row


def fingerprint(path: str) -> str | None:
    """The fingerprint that :func:`load` would give, where it can be had without reading the rows; else None."""
    local = bundled.data(path) if path.startswith(bundled.PREFIX) else Path(path).expanduser()
    return _hash(_files(local)) if local.exists() else None


def hold_out(rows: list[Located], size: float | None, seed: int) -> tuple[list[Located], list[Located]]:
    """Split rows into (training, held-out), reproducibly; rows with the same prompt stay on one side.

    ``size`` as in the config: below 1 a share, else a count, None for 10 % and at most 200.
    """
    if size is not None and not 0 <= size < float("inf"):
        raise DataError(f"data.eval_size must be a share or a count (got {size:g})")
    share = 0.1 if size is None else size
    wanted = round(share * len(rows)) if share < 1 else int(share)
    if size is None:
        wanted = min(wanted, 200)
    keys = list(dict.fromkeys(row.key for _, row in rows))
    random.Random(seed).shuffle(keys)
    counts: dict[str, int] = {}
    for _, row in rows:
        counts[row.key] = counts.get(row.key, 0) + 1
    held: set[str] = set()
    taken = 0
    for key in keys:
        if taken >= wanted:
            break
        held.add(key)
        taken += counts[key]
    if taken >= len(rows):
        why = "" if len(keys) > 1 else " (rows with one prompt stay together, and all have the same)"
        raise DataError(f"holding out {wanted} of {len(rows)} rows leaves none to train on{why}. Set data.eval_size")
    return [r for r in rows if r.row.key not in held], [r for r in rows if r.row.key in held]


def _format(
    registry: Registry, name: str | None, path: str, first: Sequence[tuple[str, RawRow | DataError]]
) -> DataFormat:
    """The format that a user named, or the one that reads most fields of most of the first rows."""
    if name is not None:
        return cast(DataFormat, registry.get("format", name))
    formats = {f.name: cast(DataFormat, f) for f in registry.all("format")}
    votes: Counter[tuple[str, ...]] = Counter()
    for _, row in first:
        if not isinstance(row, DataError):
            scores = {name: f.fits(row) for name, f in formats.items()}
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


def _convert(data_format: DataFormat, row: RawRow, where: str) -> Row:
    try:
        converted = data_format.convert(row)
        if not isinstance(converted, Row):
            raise TypeError(f"it made a {type(converted).__name__} of it, which is no row")
        return converted
    except DataError as error:
        raise DataError(f"{where}: {error} (format '{data_format.name}' needs {data_format.summary})") from None
    except Exception as error:
        raise DataError(f"{where}: format '{data_format.name}' failed on this row: {one_line(error)}") from error


def _plural(row_type: type) -> str:
    return row_type.__name__.lower() + "s"


# --- sources -------------------------------------------------------------------------------------------------------


def _open(config: DataConfig, path: str) -> tuple[Iterable[tuple[str, RawRow | DataError]], str]:
    """The raw rows at ``path`` with where they stand, and a fingerprint of their bytes."""
    local = bundled.data(path) if path.startswith(bundled.PREFIX) else Path(path).expanduser()
    files = _files(local)
    if local.is_dir():
        if _is_saved(local):
            return _saved(local, config), _hash(files)
        if not files:
            raise DataError(f"{path} is a folder without any {' '.join(READERS)} file")
        return (row for file in files for row in READERS[file.suffix](file)), _hash(files)
    if local.exists():
        if local.suffix not in READERS:
            raise DataError(f"{path}: files of data end in {', '.join(READERS)}, not '{local.suffix}'")
        return READERS[local.suffix](local), _hash(files)
    if local.suffix in READERS or path.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        beside = [p.name for p in local.parent.iterdir()] if local.parent.is_dir() else []
        raise DataError(f"no file or folder {path}.{did_you_mean(local.name, beside)}")
    return _hub(config, path)


def _files(local: Path) -> list[Path]:
    if not local.is_dir():
        return [local]
    if _is_saved(local):
        return sorted(file for file in local.rglob("*") if file.is_file())
    return sorted(file for file in local.iterdir() if file.suffix in READERS)


def _is_saved(folder: Path) -> bool:
    """Whether ``datasets`` saved it."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def _jsonl(file: Path) -> Iterator[tuple[str, RawRow | DataError]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file.name} line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig").rstrip("\r\n"))
            except UnicodeDecodeError as error:
                yield where, DataError(f"{where}: not UTF-8 (byte 0x{line[error.start]:02x}); save the file as UTF-8")
            except json.JSONDecodeError as error:
                cut = "" if line.endswith(b"\n") else " (is the file cut off?)"
                what = f"{error.msg.removesuffix(' at')} at column {error.colno}"
                yield where, DataError(f"{where}: not valid JSON: {what}{cut}")
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
                yield where, DataError(f"{where}: not valid JSON: {one_line(error)}")
            else:
                yield where, row if isinstance(row, dict) else _not_an_object(where, row)


def _json(file: Path) -> Iterator[tuple[str, RawRow | DataError]]:
    text = _text(file)
    try:
        content = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        hint = "; one object a line belongs in a .jsonl file" if error.msg == "Extra data" else ""
        raise DataError(f"{file.name} line {error.lineno}: not valid JSON: {error.msg}{hint}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file.name}: not valid JSON: {one_line(error)}") from None
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise DataError(f"{file.name} must hold a list of objects, not one {type(content).__name__}")
    for number, row in enumerate(content, 1):
        where = f"{file.name} row {number}"
        yield where, row if isinstance(row, dict) else _not_an_object(where, row)


def _csv(file: Path) -> Iterator[tuple[str, RawRow | DataError]]:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts over 128 KiB
    reader = csv.DictReader(io.StringIO(_text(file), newline=""), strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # a quote that is never closed would swallow the rest of the file
            raise DataError(f"{file.name} line {reader.reader.line_num}: not valid CSV: {error}") from None
        where = f"{file.name} line {reader.line_num}"
        if None in row or None in row.values():
            yield where, DataError(f"{where}: not as many values as the {len(reader.fieldnames or [])} columns")
        else:
            yield where, row


def _parquet(file: Path) -> Iterator[tuple[str, RawRow | DataError]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{file.name} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.name} cannot be read as Parquet: {one_line(error)}") from None


READERS: dict[str, Reader] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _saved(folder: Path, config: DataConfig) -> Iterator[tuple[str, RawRow | DataError]]:
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(folder))
    if isinstance(dataset, DatasetDict):
        if config.split not in dataset:
            raise DataError(f"{folder} has no split '{config.split}'. Splits: {', '.join(dataset)}")
        dataset = dataset[config.split]
    for number, row in enumerate(dataset, 1):
        yield f"{folder.name} row {number}", row


def _hub(config: DataConfig, path: str) -> tuple[Iterator[tuple[str, RawRow | DataError]], str]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(path, config.name, split=config.split)
    except Exception as error:  # the hub's errors are of many classes
        raise DataError(f"{path} is no file or folder here, and the hub gave: {one_line(error)}") from error
    return ((f"{path} row {number}", row) for number, row in enumerate(dataset, 1)), str(dataset._fingerprint)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{file.name} line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _not_an_object(where: str, row: object) -> DataError:
    return DataError(f"{where}: a row must be an object with named fields, not a {type(row).__name__}")


def _hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            while chunk := content.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
