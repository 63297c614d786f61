"""Raw rows from files, folders and the hub, each with its location, such as ``"prefs.jsonl line 17"``.

Rows are read one by one, as they are needed. This module does not import torch.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit import bundled, paths
from alignkit.config import DataConfig, data_sources
from alignkit.data import hub
from alignkit.data.readers import COMPRESSED, READERS, RawRows, kind_of, rows_of, without_null_fields
from alignkit.errors import ConfigError, DataError, one_line, suggestion

SPLITS = {  # the words in file names that name a split, as in the `datasets` library
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
PART = 1 << 20  # bytes of a file that are read together
NOT_DATA = ("readme", "license", "licence", "notice", "citation")  # files beside data, which need no mention


@dataclass(frozen=True)
class Source:
    """The raw rows of a data source."""

    rows: RawRows
    fingerprint: str  # a hash of its bytes
    left_out: list[str] = field(default_factory=list)  # names of files in the folder that are not read
    files: list[Path] = field(default_factory=list)  # that are read; none for data on the hub
    streaming: bool = False  # the fingerprint is of parts of the files

    def check_unchanged(self) -> None:
        """Check that the files are those that the fingerprint is of.

        Raises:
            DataError: a file has changed since the source was opened.
        """
        if self.files and _hash_of(self.files, self.streaming) != self.fingerprint:
            names = ", ".join(sorted({file.name for file in self.files}))
            raise DataError(f"{names} changed while it was read. Start again when it is complete")


def open_source(config: DataConfig, path: str) -> Source:
    """Open a file, a folder of files, a folder that ``datasets`` saved, bundled data, or a hub id.

    Raises:
        DataError: there is nothing, or nothing with rows. Also while rows are read, if a file is damaged.
    """
    local, streaming = _local(path), config.streaming
    if local.is_dir():
        files, left_out = _files(local, config.split)
        if _is_saved(local):
            rows = _guarded(local, _saved(local, config.split))
        else:
            rows = itertools.chain.from_iterable(_guarded(file, rows_of(file)) for file in files)
        return Source(rows, _hash_of(files, streaming), left_out, files, streaming)
    if local.exists():
        if kind_of(local) is None:
            raise DataError(f"{path}: data files must end in {', '.join(READERS)}, not '{local.suffix}'")
        _check_regular(local)
        fingerprint = _hash_of([local], streaming)
        return Source(_guarded(local, rows_of(local)), fingerprint, files=[local], streaming=streaming)
    if local.is_symlink():
        raise DataError(f"{path} is a link to {os.readlink(local)}, which does not exist")
    if kind_of(local) or path.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        beside = [p.name for p in local.parent.iterdir()] if local.parent.is_dir() else []
        raise DataError(suggestion(f"no file or folder {path}", local.name, beside))
    return _hub(config, path)


def fingerprints(config: DataConfig) -> dict[str, str]:
    """The fingerprints of the sources in ``config.path``, by path, and of the held-out data, by :func:`held_out_name`.

    Those that are not on this disk are left out.
    """
    each = [
        (one.path, one.path, one.split or config.split, config.streaming) for one in data_sources.parse(config.path)
    ]
    if path := config.eval_path:
        each.append((held_out_name(path), path, config.eval_split or config.split, False))
    result = {}
    for name, path, split, streaming in each:
        if (local := _local(path)).exists():
            files = _files(local, split)[0] if local.is_dir() else [local]
            result[name] = _hash_of(files, streaming)
    return result


def held_out_name(path: str) -> str:
    """The name of the source of held-out rows."""
    return f"the held-out data {path}"


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


def check_splits(config: DataConfig) -> None:
    """Check that no file is given a split, and that no file or split is both trained on and held out.

    Raises:
        ConfigError: a file has a split, or ``config.eval_path`` is training data.
        DataError: a folder has no such split.
    """
    each = data_sources.parse(config.path)
    splits = [(source.path, source.split or config.split) for source in each]
    for path, split in [*splits, *([(config.eval_path, config.eval_split)] if config.eval_path else [])]:
        if split not in (None, "train") and _local(path).is_file():
            raise ConfigError(
                f"data: {path} is a single file and has no split '{split}'. Only folders and hub datasets have splits"
            )
    if config.eval_path:
        held_out = _parts(config.eval_path, config.name, config.eval_split or config.split)
        for source in each:
            if held_out & _parts(source.path, source.name or config.name, source.split or config.split):
                raise ConfigError(
                    f"data.eval_path is the training data ({config.eval_path}). Name other data, or set data.eval_split"
                )


def _parts(path: str, name: str | None, split: str) -> set[tuple[str | None, ...]]:
    """The contents of a source: its files, or the split of a data set of the ``datasets`` library."""
    local = _local(path)
    if not local.exists() or (local.is_dir() and _is_saved(local)):
        return {(os.path.realpath(local), name, split)}
    files = _files(local, split)[0] if local.is_dir() else [local]
    return {(os.path.realpath(file),) for file in files}


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
    """``rows``, with an error of the file system or of a damaged archive turned into a DataError."""
    try:
        yield from rows
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file.name} cannot be read: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or one_line(error))


def _check_regular(file: Path) -> None:
    if not file.is_file():
        what = f"a link to {os.readlink(file)}, which does not exist" if file.is_symlink() else "not a regular file"
        raise DataError(f"{file} is {what}")


def _hash_of(files: Iterable[Path], streaming: bool) -> str:
    """A hash of the bytes of files; if they are streamed, of their sizes, first and last bytes."""
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as content:
                size = content.seek(0, os.SEEK_END)
                if streaming:
                    digest.update(f"{size}\n".encode())
                for start in (0, max(PART, size - PART)) if streaming else range(0, size, PART):
                    content.seek(start)
                    digest.update(content.read(PART))
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
    data = [file for file in inside if kind_of(file) and not file.is_dir() and not file.name.startswith(".")]
    for file in data:
        _check_regular(file)
    if not data:
        raise DataError(f"{folder} contains no {' '.join(READERS)} file")
    chosen = _of_split(folder, data, split)
    return chosen, [file.name for file in inside if file not in chosen and _looks_like_data(file)]


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """The files with the split in their names. If none has ``train``, those without a split are ``train``."""
    splits = {file: _split_in(_stem(file)) for file in files}
    wanted = SPLITS.get(split)
    chosen = [file for file in files if (splits[file] == wanted if wanted else _without_shard(_stem(file)) == split)]
    if not chosen and wanted == "train":
        chosen = [file for file in files if splits[file] is None]
    if not chosen:
        known = ", ".join(sorted({each or "train" for each in splits.values()}))
        raise DataError(
            f"{folder} has no files of the split '{split}'. Splits: {known}. Choose one with data.split=NAME"
        )
    return chosen


def _split_in(stem: str) -> str | None:
    words = re.split(r"[-._ 0-9]+", stem.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _stem(file: Path) -> str:
    """``"train_sft"`` of ``train_sft.jsonl.gz``."""
    return Path(file.stem).stem if file.suffix in COMPRESSED else file.stem


def _without_shard(stem: str) -> str:
    """``"train_sft"`` of ``"train_sft-00000-of-00002"``."""
    return re.sub(r"-\d+-of-\d+$", "", stem)


def _looks_like_data(file: Path) -> bool:
    return not file.name.startswith(".") and not file.name.lower().startswith(NOT_DATA)


def _is_saved(folder: Path) -> bool:
    """Whether ``datasets`` saved it."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


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
    hub.offline_if_unreachable()
    from datasets import load_dataset, load_dataset_builder

    try:
        if config.streaming:
            builder = load_dataset_builder(path, config.name)
            dataset, fingerprint = builder.as_streaming_dataset(config.split), builder.hash  # has the commit
        else:
            dataset = load_dataset(path, config.name, split=config.split)
            fingerprint = dataset._fingerprint
    except Exception as error:  # the errors of the hub share no base class
        why = hub.reason(error, f"datasets/{path}")
        message = f"{path} is not a local file or folder, and loading it from the hub failed: {why}"
        raise DataError(message) from error
    rows = _numbered(path, dataset)
    return Source(_from_hub(path, rows) if config.streaming else rows, str(fingerprint))


def _from_hub(path: str, rows: RawRows) -> RawRows:
    """``rows``, which are downloaded as they are read."""
    try:
        yield from rows
    except Exception as error:
        raise DataError(f"{path} cannot be read from the hub: {hub.reason(error, f'datasets/{path}')}") from error


def _numbered(name: str, dataset: Iterable[Any]) -> RawRows:
    for number, row in enumerate(dataset, 1):
        yield f"{name} row {number}", without_null_fields(row)
