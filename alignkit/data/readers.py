"""The raw rows of a file, read one by one. :data:`READERS` maps suffixes to readers."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

from alignkit.data.json_stream import JsonStream, NotAList
from alignkit.errors import DataError, one_line

RawRow: TypeAlias = Mapping[str, Any]
RawRows: TypeAlias = Iterator[tuple[str, RawRow | DataError]]  # the location, and the row or why it is bad


def _jsonl(file: Path) -> RawRows:
    with opened(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file.name} line {number}"
            try:
                written = line.decode("utf-8-sig").rstrip("\r\n")
                row = json.loads(written)
            except UnicodeDecodeError as error:
                yield where, DataError(f"{where}: not UTF-8 (byte 0x{line[error.start]:02x}); save the file as UTF-8")
            except json.JSONDecodeError as error:
                cut = "" if line.endswith(b"\n") else " (is the file cut off?)"
                what = f"{error.msg.removesuffix(' at')} at column {error.colno}"
                yield where, DataError(f"{where}: not valid JSON: {what}{cut}")
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
                yield where, DataError(f"{where}: not valid JSON: {one_line(error)}")
            else:
                yield _row(where, row, written)


def _json(file: Path) -> RawRows:
    with io.TextIOWrapper(opened(file), encoding="utf-8-sig") as text:
        stream = JsonStream(text)
        try:
            for number, (row, written) in enumerate(stream.elements("data"), 1):
                yield _row(f"{file.name} row {number}", row, written)
        except NotAList as error:
            raise DataError(f"{file.name} must hold a list of objects, not one {error}") from None
        except UnicodeDecodeError:
            raise _not_utf8(file) from None
        except json.JSONDecodeError as error:
            hint = "; one object a line belongs in a .jsonl file" if error.msg == "Extra data" else ""
            line = stream.lines_before + error.lineno
            raise DataError(f"{file.name} line {line}: not valid JSON: {error.msg}{hint}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file.name}: not valid JSON: {one_line(error)}") from None


def _csv(file: Path) -> RawRows:
    csv.field_size_limit(sys.maxsize)  # the default limit is 128 KiB
    with io.TextIOWrapper(opened(file), encoding="utf-8-sig", newline="") as lines:
        yield from _csv_rows(file, csv.DictReader(lines, strict=True))


def _csv_rows(file: Path, reader: csv.DictReader[str]) -> RawRows:
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except UnicodeDecodeError:
            raise _not_utf8(file) from None
        except csv.Error as error:  # such as a quote that is never closed
            raise DataError(f"{file.name} line {reader.reader.line_num}: not valid CSV: {error}") from None
        columns = list(reader.fieldnames or [])
        if twice := next((name for name in columns if columns.count(name) > 1), None):
            raise DataError(f"{file.name} line 1: two columns are named '{twice}'")
        where = f"{file.name} line {reader.line_num}"
        if None in row or None in row.values():
            yield where, DataError(f"{where}: not as many values as the {len(columns)} columns")
        else:
            yield where, row


def _parquet(file: Path) -> RawRows:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1000)
        for number, row in enumerate(itertools.chain.from_iterable(map(_arrow_rows, batches)), 1):
            where = f"{file.name} row {number}"
            yield where, DataError(f"{where}: {one_line(row)}") if isinstance(row, Exception) else row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.name} cannot be read as Parquet: {one_line(error)}") from None


READERS: dict[str, Callable[[Path], RawRows]] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
COMPRESSED = (".gz", ".zst")  # after each of these suffixes but that of Parquet, which compresses its columns itself


def kind_of(file: Path) -> str | None:
    """The key of a file in :data:`READERS`: ``".jsonl"`` for ``rows.jsonl.gz``. None if it is not a data file."""
    inner = Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix
    return inner if inner in READERS and not (inner == ".parquet" and file.suffix in COMPRESSED) else None


def rows_of(file: Path) -> RawRows:
    """The raw rows of a data file."""
    return READERS[cast(str, kind_of(file))](file)


def opened(file: Path) -> IO[bytes]:
    """The content of a file, decompressed if its name says that it is compressed."""
    if file.suffix == ".gz":
        return cast(IO[bytes], gzip.open(file))
    if file.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))
    return file.open("rb")


def _not_utf8(file: Path) -> DataError:
    """The error for a file that is not UTF-8, with the first line that is not."""
    with opened(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return DataError(f"{file.name} line {number}: not UTF-8 ({error.reason}); save the file as UTF-8")
    return DataError(f"{file.name} changed while it was read")


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a character, as JSON writes it


def _row(where: str, row: Any, written: str) -> tuple[str, RawRow | DataError]:
    """A value that was ``written`` as JSON, or why it is no row."""
    if not isinstance(row, dict):
        return where, DataError(f"{where}: a row must be an object with named fields, not a {type(row).__name__}")
    if _SURROGATE.search(written) and (problem := _not_unicode(row)):
        return where, DataError(f"{where}: {problem}")
    return where, row


def _not_unicode(row: RawRow) -> str | None:
    """Why a text in a row is not Unicode; None if all are."""
    parts: list[Any] = list(row.items())  # no recursion: JSON can be nested as deeply as Python's stack allows
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            parts += part.keys()
            parts += part.values()
        elif isinstance(part, list | tuple):
            parts += part
        elif isinstance(part, str):
            try:
                part.encode()
            except UnicodeEncodeError as error:
                half = f"half of a character, \\u{ord(part[error.start]):04x} (a lone surrogate)"
                return f"a text holds {half}, after {part[max(0, error.start - 20) : error.start]!r}"
    return None


def _arrow_rows(batch: Any) -> Iterator[RawRow | Exception]:
    """The rows of an Arrow batch, with an error for each row that Python cannot represent."""
    try:
        yield from [without_null_fields(row) for row in batch.to_pylist()]
    except (ValueError, OverflowError) as error:  # bytes that are not UTF-8, a time before the year 1
        if batch.num_rows == 1:
            yield error
        else:
            yield from itertools.chain.from_iterable(_arrow_rows(batch.slice(i, 1)) for i in range(batch.num_rows))


def without_null_fields(row: RawRow) -> RawRow:
    """A row of an Arrow table without its null fields, also in nested objects."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """A nested value without null fields. In Arrow, every object has the fields of all objects of its column."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
