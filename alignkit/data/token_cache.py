"""Encodes rows in several processes into an Arrow file in the cache of ``datasets``, which the next start reads.

An encoder turns a row into records: dictionaries of numbers and lists of token ids. The name of the file is a
fingerprint of everything that the records depend on: the rows, the tokenizer, its chat template, the encoder's settings
and the versions of alignkit and ``tokenizers``. When several processes train together, the first encodes and the others
wait.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from alignkit.data.row_cache import values
from alignkit.data.spool import Spool, spool
from alignkit.errors import AlignkitError, DataError, one_line

if TYPE_CHECKING:
    import datasets
    import pyarrow

    from alignkit.rows import Located

CACHED = 2000  # rows; fewer are encoded in memory
ROWS_A_PROCESS = 2500  # at least, or starting the process takes longer than its work


class Encoder(Protocol):
    """Turns a row into records. It is pickled for the processes that share the work."""

    columns: ClassVar[dict[str, str]]  # names and types of the columns of a record, such as "list<int32>"

    def __call__(self, row: Any, notes: Counter[str]) -> list[dict[str, Any]]:
        """The records of a row; ``notes`` counts messages for the user.

        Raises:
            DataError: the row is bad.
        """

    def fingerprint(self) -> str:
        """A hash of everything other than the row that records depend on."""


@dataclass(frozen=True)
class Encoded:
    """Records in an Arrow table, in the order of their rows. A row without records has a record of nulls."""

    dataset: datasets.Dataset  # the columns of the encoder, and `row`, `error` and `notes`
    rows: Sequence[Located]  # including bad rows; `row` is an index into them

    def column(self, name: str) -> pyarrow.ChunkedArray:
        """A column of the table."""
        return self.dataset.data.column(name)

    def ids(self, name: str, record: int) -> Any:
        """The token ids in a column of one record: a list, or a list of lists."""
        return _plain(self.column(name)[record].values)

    def number(self, record: int) -> int:
        """The number of the row of a record, an index into ``rows``."""
        return int(self.column("row")[record].as_py())

    def located(self, record: int) -> Located:
        """The row of a record."""
        return self.rows[self.number(record)]

    def where(self, record: int) -> str:
        """The location of the row of a record."""
        return self.located(record).where

    def good(self) -> Sequence[int]:
        """The indices of the records of good rows."""
        if not self.errors():
            return range(len(self.dataset))
        return [n for n, error in enumerate(self.column("error")) if error.as_py() is None]

    def notes(self) -> Counter[str]:
        """The messages that the encoder counted."""
        total: Counter[str] = Counter()
        for each in self.column("notes").value_counts():
            for note, count in json.loads(each["values"].as_py() or "{}").items():
                total[note] += count * each["counts"].as_py()
        return total

    def errors(self) -> dict[int, str]:
        """Row number -> why the row is bad."""
        if self.column("error").null_count == len(self.dataset):
            return {}
        import pyarrow.compute as pc

        bad = self.dataset.data.table.select(["row", "error"]).filter(pc.is_valid(self.column("error")))
        return dict(zip(bad["row"].to_pylist(), bad["error"].to_pylist(), strict=True))


def _plain(ids: pyarrow.Array) -> list[Any]:
    """An Arrow array of token ids as a list."""
    nested = hasattr(ids, "offsets")
    return [_plain(each.values) for each in ids] if nested else ids.to_numpy(zero_copy_only=False).tolist()


def encode_all(
    rows: Sequence[Located], encoder: Encoder, *, skip: bool, processes: int | None, say: Callable[[str], None]
) -> Encoded:
    """Encode all rows. It stops at the first bad row unless ``skip`` is set.

    ``processes`` is the number of processes that share the work; None is one for each core.
    """
    import datasets

    features = datasets.Features(_features(encoder.columns))
    if len(rows) < CACHED:
        records = list(_records([(0, rows)], encoder, skip))
        return Encoded(datasets.Dataset.from_list(records, features), rows)
    key = _key(rows, encoder, skip)
    for attempt in range(2):
        try:
            return Encoded(_cached(key, rows, encoder, skip, features, processes, say), rows)
        except _Damaged as error:
            if attempt:
                raise DataError(f"the cache of encoded rows cannot be read: {error}") from error
            say(f"encoding the rows again: their cache is damaged ({error})")
    raise AssertionError


class _Damaged(Exception):  # noqa: N818
    """A file in the cache cannot be read."""


def _cached(
    key: str,
    rows: Sequence[Located],
    encoder: Encoder,
    skip: bool,
    features: Any,
    processes: int | None,
    say: Callable[[str], None],
) -> datasets.Dataset:
    import datasets

    folder = datasets.config.HF_DATASETS_CACHE / "generator" / f"default-fingerprint={key}"

    def generate(shards: list[tuple[int, Sequence[Located]]], processes: int | None = None) -> datasets.Dataset:
        with _progress_bar():
            return datasets.Dataset.from_generator(
                _records,
                features=features,
                gen_kwargs={"shards": shards, "encoder": encoder, "skip": skip},
                fingerprint=key,
                num_proc=processes,
            )

    is_cached = any(info.parent.suffix != ".incomplete" for info in folder.glob("*/dataset_info.json"))
    try:
        if is_cached or (shares := _shares(len(rows), processes)) == 1:
            dataset = generate([(0, rows)])
        else:
            say(f"encoding {len(rows)} rows in {shares} processes")
            dataset = _in_parallel(rows, shares, generate, say)
        dataset.data.validate()
        if len(dataset) != dataset.info.splits["train"].num_examples:
            raise OSError(f"{len(dataset)} records are left")
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, OSError):
            raise AlignkitError(f"the encoded rows cannot be written to {folder}: {error.__cause__}") from error
        raise (error.__cause__ or error) from None
    except Exception as error:  # damaged files raise errors of several libraries
        if not is_cached:
            raise
        shutil.rmtree(folder, ignore_errors=True)
        raise _Damaged(one_line(error)) from error
    return dataset


def _in_parallel(
    rows: Sequence[Located], shares: int, generate: Callable[..., datasets.Dataset], say: Callable[[str], None]
) -> datasets.Dataset:
    """Call ``generate`` with several processes, which read the rows from a file. If they fail, one does all."""
    written = rows if isinstance(rows, Spool) else spool(rows)
    edges = [len(rows) * n // shares for n in range(shares + 1)]
    shards = [(start, written[start:end]) for start, end in itertools.pairwise(edges)]
    try:
        with _without_threads():
            return generate(shards, shares)
    except Exception as error:  # such as a plugin that the processes cannot import
        if _is_interrupted(error):
            raise KeyboardInterrupt from None
        say(f"encoding in one process, since several failed: {one_line(error.__cause__ or error)}")
        return generate([(0, rows)])


def _is_interrupted(error: BaseException | None) -> bool:
    """Whether an error hides the user's Ctrl-C: ``datasets`` raises others while it stops its processes."""
    return error is not None and (isinstance(error, KeyboardInterrupt) or _is_interrupted(error.__context__))


def _records(shards: list[tuple[int, Sequence[Located]]], encoder: Encoder, skip: bool) -> Iterator[dict[str, Any]]:
    """The records of rows. ``shards`` are parts of the rows, each with the number of its first row."""
    import multiprocess  # type: ignore[import-untyped]

    if multiprocess.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops the others
    empty = dict.fromkeys(encoder.columns)
    for first, rows in shards:
        for number, located in enumerate(rows, first):
            notes: Counter[str] = Counter()
            try:
                made = encoder(located.row, notes)
            except DataError as error:
                yield {**empty, "row": number, "error": str(error), "notes": ""}
                if not skip:
                    return
                continue
            written = json.dumps(notes) if notes else ""
            for n, record in enumerate(made or [empty]):
                yield {**record, "row": number, "error": None, "notes": "" if n else written}


def _features(columns: dict[str, str]) -> dict[str, Any]:
    """The types of ``datasets`` for columns."""
    own = {"row": "int64", "error": "string", "notes": "string"}
    return {name: _feature(type_) for name, type_ in {**columns, **own}.items()}


def _feature(type_: str) -> Any:
    from datasets import List, Value

    return List(_feature(type_[5:-1])) if type_.startswith("list<") else Value(type_)


def stored_dataset(records: Sequence[Mapping[str, Any]], columns: dict[str, str]) -> datasets.Dataset:
    """A dataset of records, in a temporary file if they are many. ``columns`` are those of :class:`Encoder`."""
    import datasets
    from datasets.arrow_writer import ArrowWriter

    features = datasets.Features({name: _feature(type_) for name, type_ in columns.items()})
    if len(records) < CACHED:
        return datasets.Dataset.from_list(list(records), features)
    handle, name = tempfile.mkstemp(prefix="alignkit-records-", suffix=".arrow")
    os.close(handle)
    with ArrowWriter(features=features, path=name) as writer:
        for record in records:
            writer.write(record)
        writer.finalize()
    dataset = datasets.Dataset.from_file(name)
    atexit.register(Path(name).unlink, missing_ok=True)
    return dataset


def _shares(rows: int, processes: int | None) -> int:
    """The number of processes for a number of rows."""
    if processes is None:
        processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(processes, rows // ROWS_A_PROCESS))


@contextlib.contextmanager
def _progress_bar() -> Iterator[None]:
    """Show the progress bar of ``datasets`` on a terminal, even if the command line has turned such bars off."""
    import datasets

    is_disabled = datasets.utils.are_progress_bars_disabled()
    if is_disabled and sys.stderr.isatty() and "HF_DATASETS_DISABLE_PROGRESS_BARS" not in os.environ:
        datasets.enable_progress_bars()
    try:
        yield
    finally:
        if is_disabled:
            datasets.disable_progress_bars()


@contextlib.contextmanager
def _without_threads() -> Iterator[None]:
    """Turn the threads of the ``tokenizers`` library off, unless the user has set them."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]


def _key(rows: Sequence[Located], encoder: Encoder, skip: bool) -> str:
    """The fingerprint of the records of these rows, which depend on the code that makes them too."""
    import xxhash

    kind = f"{type(encoder).__module__}.{type(encoder).__qualname__}"
    digest = xxhash.xxh3_128(json.dumps([kind, encoder.columns, encoder.fingerprint(), skip]).encode())
    own = getattr(sys.modules[type(encoder).__module__], "__file__", None)  # None in a notebook
    for file in sorted({*([Path(own)] if own else []), *Path(__file__).parent.glob("*.py")}):
        digest.update(file.name.encode() + file.read_bytes())
    for content in values(rows, "content"):
        digest.update(content)
    return digest.hexdigest()
