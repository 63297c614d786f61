"""Converted rows in an Arrow file, which the next start reads instead of the data.

The name of the file is a hash of everything that the rows depend on: the bytes and names of the data files, the format
and its settings, the types of rows that the stage accepts, what happens to bad rows, and the code that reads and
converts them. Code of other distributions may depend on more, so only the rows of alignkit's own formats are cached.
Rows are stored as JSON: unlike a pickle, it cannot run code when it is read.
"""

from __future__ import annotations

import array
import hashlib
import io
import itertools
import json
import os
import pickle
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from alignkit.data import spool
from alignkit.errors import AlignkitError, one_line
from alignkit.rows import Demonstration, Located, Prompt, Ranking, Rated, Row, Text

if TYPE_CHECKING:
    import pyarrow

TYPES: dict[str, type] = {each.__name__: each for each in (Demonstration, Ranking, Rated, Prompt, Text)}
BATCH = 1000  # rows that are written together
VALUES = 1 << 16  # of a column that are read together


class Record(NamedTuple):
    """The result of a format for a row: a row, an error, or nothing. It may also make several records with a row."""

    where: str
    row: Row | None = None
    error: str | None = None
    origin: str | None = None  # what the raw row says about where its answers come from, as JSON


class Converted(NamedTuple):
    """The rows of a source, and what became of the other raw rows."""

    rows: Sequence[Located]
    skipped: list[str]  # why they are bad
    empty: int  # the format makes no row of them
    origins: list[str]  # of the records, each once


class NotJson(Exception):  # noqa: N818
    """A row has a value that JSON cannot represent exactly, such as a date in a Parquet file."""


def converted(records: Iterable[Record], file: Path | None) -> Converted:
    """The rows of records: a list, or an Arrow file if they are many. A ``file`` that exists is read instead.

    Without ``file``, many rows are in a temporary file (see :mod:`alignkit.data.spool`).

    Raises:
        NotJson: the rows cannot be written to ``file``.
    """
    if file is not None and (cached := _read(file)):
        return cached
    records = iter(records)
    first = list(itertools.islice(records, spool.IN_MEMORY))
    records = itertools.chain(first, records)
    if file is not None and len(first) == spool.IN_MEMORY:
        _write(records, file)
        return cast(Converted, _read(file))
    skipped, empty, origins = [], 0, dict[str, None]()

    def good() -> Iterator[Located]:
        nonlocal empty
        for where, row, error, origin in records:
            if origin is not None:
                origins[origin] = None
            if row is not None:
                yield Located(where, row)
            elif error is not None:
                skipped.append(error)
            else:
                empty += 1

    rows = spool.stored(good())
    return Converted(rows, skipped, empty, list(origins))


# --- what rows are compared by -------------------------------------------------------------------------------------


def key_hash(row: Row) -> bytes:
    """A hash of the row's key."""
    return hashlib.blake2b(row.key.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def content_hash(row: Row) -> bytes:
    """A hash of the whole row."""
    content = io.BytesIO()
    pickler = pickle.Pickler(content, protocol=5)
    pickler.fast = True  # no references to earlier objects: the bytes depend only on the values
    pickler.dump(row)
    return hashlib.blake2b(content.getbuffer(), digest_size=16).digest()


COLUMNS: dict[str, Callable[[Located], Any]] = {
    "where": lambda located: located.where,
    "key": lambda located: key_hash(located.row),
    "content": lambda located: content_hash(located.row),
}


def values(rows: Sequence[Located], name: str) -> Iterator[Any]:
    """A column of :data:`COLUMNS`. It is read from the file if the rows are in one."""
    if isinstance(rows, spool.Spool) and isinstance(rows.file, StoredRows):
        return rows.file.values(name, rows.offsets)
    return map(COLUMNS[name], rows)


# --- the file ------------------------------------------------------------------------------------------------------


class StoredRows:
    """The rows in Arrow files and tables, one after the other, for :class:`alignkit.data.spool.Spool`."""

    def __init__(self, parts: Sequence[Path | pyarrow.Table]) -> None:
        import pyarrow

        self.parts = parts
        self.table = pyarrow.concat_tables(map(_table, parts))

    def read(self, number: int) -> Located:
        """The row in a record."""
        where, type_, row = (self.table[name][number].as_py() for name in ("where", "type", "row"))
        return Located(where, TYPES[type_](**json.loads(row)))

    def values(self, name: str, numbers: Sequence[int]) -> Iterator[Any]:
        """The values of a column in these records."""
        import pyarrow

        for start in range(0, len(numbers), VALUES):
            part = pyarrow.array(numbers[start : start + VALUES], pyarrow.int64())
            yield from self.table[name].take(part).to_pylist()

    def __reduce__(self) -> Any:
        return StoredRows, (self.parts,)


def _table(part: Path | pyarrow.Table) -> pyarrow.Table:
    """A table, or that in a file, which is read when it is accessed."""
    import pyarrow

    if not isinstance(part, Path):
        return part
    table = pyarrow.ipc.open_file(pyarrow.memory_map(str(part))).read_all()
    table.validate()
    return table


def joined(parts: Sequence[Sequence[Located]]) -> Sequence[Located]:
    """The rows of several sources as one sequence."""
    if len(parts) == 1:
        return parts[0]
    rows = itertools.chain.from_iterable(parts)
    if all(isinstance(part, list) for part in parts):
        return list(rows)
    tables: list[Path | pyarrow.Table] = []
    numbers, start = array.array("q"), 0
    try:
        for part in parts:
            stored, own = _stored(part)
            tables += stored.parts
            numbers.extend(start + number for number in own)
            start += len(stored.table)
    except NotJson:
        return spool.spool(rows)
    return spool.Spool(StoredRows(tables), numbers)


def _stored(rows: Sequence[Located]) -> tuple[StoredRows, Sequence[int]]:
    """Rows in a table, and their numbers in it."""
    import pyarrow

    if isinstance(rows, spool.Spool) and isinstance(rows.file, StoredRows):
        return rows.file, rows.offsets
    if isinstance(rows, spool.Spool):
        raise NotJson
    table = pyarrow.Table.from_pylist([_columns(Record(*located)) for located in rows], _schema())
    return StoredRows([table]), range(len(rows))


def _read(file: Path) -> Converted | None:
    """The rows in a file; None if there is none, or it is damaged."""
    if not file.exists():
        return None
    import pyarrow
    import pyarrow.compute as pc

    try:
        stored = StoredRows([file])
    except (pyarrow.ArrowException, OSError):
        file.unlink()
        return None
    types, errors = stored.table["type"], stored.table["error"]
    skipped = errors.drop_null().to_pylist()
    good: Sequence[int] = range(len(types))
    if types.null_count:
        good = array.array("q", pc.indices_nonzero(types.is_valid()).to_numpy().astype("int64").tobytes())
    origins = pc.unique(stored.table["origin"]).drop_null().to_pylist()
    return Converted(spool.Spool(stored, good), skipped, types.null_count - len(skipped), origins)


def _write(records: Iterator[Record], file: Path) -> None:
    """Write records to a file. Of several processes, one writes and the others wait."""
    import pyarrow
    from filelock import FileLock

    part, schema = file.with_suffix(".part"), _schema()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if file.exists():
                return
            try:
                with pyarrow.OSFile(str(part), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:
                    while batch := [_columns(record) for record in itertools.islice(records, BATCH)]:
                        writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema))
                part.replace(file)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        why = error.strerror or one_line(error)
        raise AlignkitError(
            f"the rows cannot be written to {file.parent}: {why}. Set HF_DATASETS_CACHE to another folder"
        ) from error


def _schema() -> pyarrow.Schema:
    import pyarrow

    text, digest = pyarrow.string(), pyarrow.binary(16)
    columns = {"where": text, "type": text, "row": pyarrow.large_string(), "error": text, "origin": text}
    return pyarrow.schema({**columns, "key": digest, "content": digest})


def _columns(record: Record) -> dict[str, Any]:
    columns = record._asdict()
    if (row := columns.pop("row")) is None:
        return columns
    fields = vars(row)
    try:
        text = json.dumps(fields)
    except (TypeError, ValueError) as problem:
        raise NotJson from problem
    if type(row).__name__ not in TYPES or json.loads(text) != fields:
        raise NotJson
    hashes = {"key": key_hash(row), "content": content_hash(row)}
    return {**columns, **hashes, "type": type(row).__name__, "row": text}


def file_for(code: Iterable[str], files: Sequence[Path], **depends_on: Any) -> Path:
    """The file for rows that depend on these values, the code of these packages, and the names of the data files."""
    depends_on["files"] = [[file.name, file.stat().st_size] for file in files]
    depends_on["python"] = platform.python_version()
    depends_on["libraries"] = [version(name) for name in ("pyarrow", "datasets")]
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=repr).encode())
    for package in code:
        folder = Path(cast(str, sys.modules[package].__file__)).parent
        for source in sorted(folder.rglob("*.py")):
            digest.update(f"{source.relative_to(folder)}\n".encode() + source.read_bytes())
    return folder_of_cache() / "alignkit-rows" / f"{digest.hexdigest()[:32]}.arrow"


def folder_of_cache() -> Path:
    """The cache of ``datasets``, without importing it."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{home}/huggingface"
    return Path(os.environ.get("HF_DATASETS_CACHE") or f"{home}/datasets").expanduser()
