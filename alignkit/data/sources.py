"""Raw rows from files, folders and the hub, each with its location, such as ``"prefs.jsonl line 17"``.

Rows are read one by one, as they are needed. This module does not import torch.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from alignkit import bundled, paths
from alignkit.config import DataConfig, data_sources
from alignkit.errors import DataError, did_you_mean, one_line

RawRow: TypeAlias = Mapping[str, Any]
RawRows: TypeAlias = Iterator[tuple[str, RawRow | DataError]]  # the location, and the row or why it is bad

SPLITS = {  # the words in file names that name a split, as in the `datasets` library
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
NOT_DATA = ("readme", "license", "licence", "notice", "citation")  # files beside data, which need no mention


@dataclass(frozen=True)
class Source:
    """The raw rows of a data source."""

    rows: RawRows
    fingerprint: str  # a hash of its bytes
    left_out: list[str] = field(default_factory=list)  # names of files in the folder that are not read
    files: list[Path] = field(default_factory=list)  # that are read; none for data on the hub

    def check_unchanged(self) -> None:
        """Check that the files are those that the fingerprint is of.

        Raises:
            DataError: a file has changed since the source was opened.
        """
        if self.files and _hash(self.files) != self.fingerprint:
            names = ", ".join(sorted({file.name for file in self.files}))
            raise DataError(f"{names} changed while it was read. Start again when it is complete")


def open_source(config: DataConfig, path: str) -> Source:
    """Open a file, a folder of files, a folder that ``datasets`` saved, bundled data, or a hub id.

    Raises:
        DataError: there is nothing, or nothing with rows. Also while rows are read, if a file is damaged.
    """
    local = _local(path)
    if local.is_dir():
        files, left_out = _files(local, config.split)
        if _is_saved(local):
            return Source(_guarded(local, _saved(local, config.split)), _hash(files), files=files)
        rows = itertools.chain.from_iterable(_guarded(file, READERS[file.suffix](file)) for file in files)
        return Source(rows, _hash(files), left_out, files)
    if local.exists():
        if local.suffix not in READERS:
            raise DataError(f"{path}: data files must end in {', '.join(READERS)}, not '{local.suffix}'")
        _check_regular(local)
        return Source(_guarded(local, READERS[local.suffix](local)), _hash([local]), files=[local])
    if local.is_symlink():
        raise DataError(f"{path} is a link to {os.readlink(local)}, which does not exist")
    if local.suffix in READERS or path.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        beside = [p.name for p in local.parent.iterdir()] if local.parent.is_dir() else []
        raise DataError(f"no file or folder {path}.{did_you_mean(local.name, beside)}")
    return _hub(config, path)


def fingerprints(config: DataConfig) -> dict[str, str]:
    """The fingerprint of each source in ``config.path`` that is on this disk."""
    result = {}
    for source in data_sources.parse(config.path):
        if (local := _local(source.path)).exists():
            files = _files(local, source.split or config.split)[0] if local.is_dir() else [local]
            result[source.path] = _hash(files)
    return result


def with_folder(path: str, rows: RawRows, of_split: str = "") -> RawRows:
    """``rows`` of the source ``path`` with the folder in their locations: ``"round-1/rankings.jsonl line 3"``.

    Locations are then different for all sources of a run. ``of_split`` is the split, if it is the source's own.
    """
    local, is_bundled = _local(path), path.startswith(bundled.PREFIX)
    of_files = local.is_dir() and not _is_saved(local)
    folder = path if of_files else os.path.dirname(os.path.normpath(path)) if local.exists() else ""
    prefix = bundled.PREFIX if is_bundled else os.path.join(folder, "") if folder else ""
    prefix += f"{of_split} of " if of_split and not of_files else ""
    try:
        for where, row in rows:
            yield prefix + where, DataError(f"{prefix}{row}") if isinstance(row, DataError) else row
    except DataError as error:
        raise DataError(f"{prefix}{error}") from None


def is_file(path: str) -> bool:
    """Whether ``path`` is a local file. A file has no splits."""
    return _local(path).is_file()


def _local(path: str) -> Path:
    if path.startswith(bundled.PREFIX):
        return bundled.data(path)
    if not path.strip():
        raise DataError("the path of the data is empty")
    try:
        local = paths.expand(path)
        local.exists()
    except OSError as error:  # the name is too long, or a folder is not readable
        raise DataError(f"{path} cannot be read: {_reason(error)}") from None
    return local


def _guarded(file: Path, rows: RawRows) -> RawRows:
    """``rows``, with an OSError turned into a DataError."""
    try:
        yield from rows
    except OSError as error:
        raise DataError(f"{file.name} cannot be read: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or one_line(error))


def _check_regular(file: Path) -> None:
    if not file.is_file():
        what = f"a link to {os.readlink(file)}, which does not exist" if file.is_symlink() else "not a regular file"
        raise DataError(f"{file} is {what}")


def _hash(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as content:
                while chunk := content.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            raise DataError(f"{file} cannot be read: {_reason(error)}") from None
    return digest.hexdigest()


# --- folders -------------------------------------------------------------------------------------------------------


def _files(folder: Path, split: str) -> tuple[list[Path], list[str]]:
    """The files of a split in a folder, and the names of the other files.

    Raises:
        DataError: the split has no files; a data file is a broken link or not a regular file.
    """
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {_reason(error)}") from None
    if _is_saved(folder):
        return sorted(file for file in folder.rglob("*") if file.is_file()), []
    data = [file for file in inside if file.suffix in READERS and not file.is_dir() and not file.name.startswith(".")]
    for file in data:
        _check_regular(file)
    if not data:
        raise DataError(f"{folder} contains no {' '.join(READERS)} file")
    chosen = _of_split(folder, data, split)
    return chosen, [file.name for file in inside if file not in chosen and _looks_like_data(file)]


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """The files with the split in their names. If none has ``train``, those without a split are ``train``."""
    splits = {file: _split_in(file.stem) for file in files}
    wanted = SPLITS.get(split)
    chosen = [file for file in files if (splits[file] == wanted if wanted else _without_shard(file.stem) == split)]
    if not chosen and wanted == "train":
        chosen = [file for file in files if splits[file] is None]
    if not chosen:
        known = ", ".join(sorted({each or "train" for each in splits.values()}))
        raise DataError(f"{folder} has no files of the split '{split}'. Splits: {known}. Pick one with data.split=NAME")
    return chosen


def _split_in(stem: str) -> str | None:
    words = re.split(r"[-._ 0-9]+", stem.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _without_shard(stem: str) -> str:
    """``"train_sft"`` of ``"train_sft-00000-of-00002"``."""
    return re.sub(r"-\d+-of-\d+$", "", stem)


def _looks_like_data(file: Path) -> bool:
    return not file.name.startswith(".") and not file.name.lower().startswith(NOT_DATA)


def _is_saved(folder: Path) -> bool:
    """Whether ``datasets`` saved it."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


# --- kinds of files ------------------------------------------------------------------------------------------------


def _jsonl(file: Path) -> RawRows:
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


def _json(file: Path) -> RawRows:
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


def _csv(file: Path) -> RawRows:
    csv.field_size_limit(sys.maxsize)  # the default limit is 128 KiB
    with file.open(encoding="utf-8-sig", newline="") as lines:
        yield from _csv_rows(file, csv.DictReader(lines, strict=True))


def _csv_rows(file: Path, reader: csv.DictReader[str]) -> RawRows:
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except UnicodeDecodeError:
            _text(file)  # says where
            raise
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


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{file.name} line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _not_an_object(where: str, row: object) -> DataError:
    return DataError(f"{where}: a row must be an object with named fields, not a {type(row).__name__}")


def _arrow_rows(batch: Any) -> Iterator[RawRow | Exception]:
    """The rows of an Arrow batch, with an error for each row that Python cannot represent."""
    try:
        yield from [_without_null_fields(row) for row in batch.to_pylist()]
    except (ValueError, OverflowError) as error:  # bytes that are not UTF-8, a time before the year 1
        if batch.num_rows == 1:
            yield error
        else:
            yield from itertools.chain.from_iterable(_arrow_rows(batch.slice(i, 1)) for i in range(batch.num_rows))


def _without_null_fields(row: RawRow) -> RawRow:
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """A nested value without null fields. In Arrow, every object has the fields of all objects of its column."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


# --- data sets of the `datasets` library -----------------------------------------------------------------------------


def _saved(folder: Path, split: str) -> RawRows:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(folder))
    except Exception as error:  # the errors of a damaged folder share no base class
        raise DataError(f"{folder} cannot be read as a data set: {one_line(error)}") from error
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise DataError(f"{folder} has no split '{split}'. Splits: {', '.join(dataset)}")
        dataset = dataset[split]
    yield from _numbered(folder.name, dataset)


def _hub(config: DataConfig, path: str) -> Source:
    from datasets import load_dataset

    try:
        dataset = load_dataset(path, config.name, split=config.split)
    except Exception as error:  # the errors of the hub share no base class
        message = f"{path} is not a local file or folder, and loading it from the hub failed: {one_line(error)}"
        raise DataError(message) from error
    return Source(_numbered(path, dataset), str(dataset._fingerprint))


def _numbered(name: str, dataset: Iterable[Any]) -> RawRows:
    for number, row in enumerate(dataset, 1):
        yield f"{name} row {number}", _without_null_fields(row)
