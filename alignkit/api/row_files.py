"""Writes lists of rows to files, so that a run on them can be resumed and reproduced. No torch here."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from alignkit.config.data_sources import DataSource
from alignkit.config.settings import names
from alignkit.errors import DataError, one_line
from alignkit.rows import Demonstration, Prompt, Ranking, Rated, Text


def with_files(tables: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """``tables`` of a config in which each ``data`` table names files: rows in it are written to ``folder``.

    Rows that are not in a table are its ``path``.

    Raises:
        DataError: a row cannot be written, or a list contains both rows and sources.
    """
    result = {}
    for key, value in tables.items():
        if key == "data" and value is not None:
            table = value if isinstance(value, Mapping) else {"path": value}
            result[key] = {name: _named(name, each, folder) for name, each in table.items()}
        else:
            result[key] = with_files(value, folder) if isinstance(value, Mapping) else value
    return result


def _named(name: str, value: Any, folder: Path) -> Any:
    return path_of(value, folder) if name in ("path", "eval_path") else value


def path_of(data: Any, folder: Path) -> Any:
    """``data`` as a value of ``data.path``. Rows are written to a file in ``folder``, whose name is their hash.

    Raises:
        DataError: a row cannot be written, or ``data`` contains both rows and sources.
    """
    if data is None or isinstance(data, str):
        return data
    if isinstance(data, os.PathLike):
        return os.fspath(data)
    if _is_source(data):
        data = [data]
    entries = list(_checked(data))
    sources = [isinstance(each, str | os.PathLike) or _is_source(each) for each in entries]
    if all(sources):
        return [dict(each) if isinstance(each, Mapping) else os.fspath(each) for each in entries]
    if any(sources):
        raise DataError("data contains both rows and paths. Pass a list of rows, or a list of paths")
    return str(write(entries, folder))


def _checked(rows: Any) -> Any:
    """``rows``, if iterating over them gives rows, not the names of columns or keys.

    Raises:
        DataError: they are a table or a dictionary.
    """
    if isinstance(rows, Mapping):
        keys = ", ".join(map(str, rows))
        raise DataError(f"data is a {type(rows).__name__} with the keys {keys}. Pass a list of rows")
    if hasattr(rows, "columns"):  # of pandas, Polars or PyArrow
        raise DataError(
            f"data is a {type(rows).__name__}. Pass a list of its rows as dictionaries, such as "
            'frame.to_dict("records") with pandas'
        )
    return rows


def _is_source(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "path" in entry and set(entry) <= set(names(DataSource))


def write(rows: Iterable[Any], folder: Path) -> Path:
    """Write rows to ``folder/rows-HASH.jsonl``, each on the line of its number.

    Raises:
        DataError: a row is of another type, or has a value that JSON cannot represent; the folder is not writable.
    """
    digest = hashlib.sha256()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f".rows-{secrets.token_hex(4)}"
        try:
            with unfinished.open("xb") as file:
                for number, row in enumerate(rows, 1):
                    line = _line(row, number)
                    digest.update(line)
                    file.write(line)
            path = folder / f"rows-{digest.hexdigest()[:12]}.jsonl"
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"the rows cannot be written to {folder}: {error.strerror or one_line(error)}") from error
    return path


@contextlib.contextmanager
def path_for(rows: Any) -> Iterator[str]:
    """The path of a file with these rows, which is deleted afterwards; a path stays as it is. A string is a prompt.

    Raises:
        DataError: as :func:`write`; or they are a table or a dictionary.
    """
    if isinstance(rows, Mapping) and set(rows) == {"path"}:
        rows = rows["path"]
    if isinstance(rows, str | os.PathLike):
        yield os.fspath(rows)
        return
    rows = _checked(rows)
    with tempfile.TemporaryDirectory(prefix="alignkit-") as folder:
        yield str(write(({"prompt": row} if isinstance(row, str) else row for row in rows), Path(folder)))


def _line(row: Any, number: int) -> bytes:
    fields = _fields(row)
    if fields is None:
        raise DataError(
            f"row {number} is a {type(row).__name__}. Rows are dictionaries, or rows of alignkit, such as "
            "alignkit.Prompt; write others to a file in the format of their plugin"
        )
    try:
        return json.dumps(fields, ensure_ascii=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise DataError(f"row {number} cannot be written as JSON: {one_line(error)}") from error


def _fields(row: Any) -> dict[str, Any] | None:
    """A row in the shape that its built-in format reads; None if it has none."""
    if isinstance(row, Mapping):
        return dict(row)
    if not isinstance(row, Demonstration | Ranking | Rated | Prompt | Text):
        return None
    fields = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    written = {key: value for key, value in fields.items() if value is not None}
    if isinstance(row, Prompt):
        written = {**written.pop("fields"), **written}
    for name, other in (("answers", "responses"), ("answer", "completion"), ("good", "label")):
        if name in fields:
            written[other] = written.pop(name)
    return written
