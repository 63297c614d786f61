"""Rows that are read while a run trains on them, for data that do not fit into memory (``data.streaming``).

The rows are read in blocks. Each block is shuffled with a seed of its own, and each process takes its share of it. The
place in a stream is therefore a few numbers, from which reading can go on.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from alignkit.config import DataConfig, data_sources
from alignkit.data.readers import RawRow
from alignkit.data.reading import Rows, SourceReader, WrongKindError
from alignkit.data.row_cache import key_hash
from alignkit.errors import ConfigError, DataError
from alignkit.registry import Registry
from alignkit.rows import Located, Row

HEAD = 2000  # training rows that are read before training: to check them, and for what is reported of their lengths
HELD_OUT = 200  # rows, by default
BLOCK = 1000  # rows that are read together without shuffling


class RawLocated(NamedTuple):
    """A raw row, or why it is bad, with its location and its source."""

    reader: SourceReader
    where: str
    content: RawRow | DataError


@dataclass(frozen=True)
class Position:
    """A place between two blocks of a stream."""

    epoch: int = 0  # how often the stream was read to its end
    row: int = 0  # raw rows of this epoch before it, without held-out rows
    total: int = 0  # raw rows of all epochs before it


class RowStream:
    """The rows of ``data.path``. The first ones are held out, and the others are read again in every epoch.

    The rows of several sources alternate: one of each in turn, until all have ended. A training row with the prompt of
    a held-out row is left out.

    Attributes:
        train_rows: the first training rows, at most :data:`HEAD`.
        eval_rows: the held-out rows.
        source: what is read, for the plan.
    """

    def __init__(self, registry: Registry, config: DataConfig, accepts: tuple[type[Row], ...]) -> None:
        sources = data_sources.parse(config.path)
        if weighted := next((source for source in sources if source.weight != 1), None):
            raise ConfigError(
                f"data.path: a weight needs the number of rows, which data.streaming does not know. Leave out the "
                f"weight of {weighted.path}"
            )
        self.config = config
        several = len(sources) > 1
        self.readers = [SourceReader(registry, config, source, accepts, several) for source in sources]
        self.fingerprints = [reader.opened.fingerprint for reader in self.readers]
        self.skipped: list[str] = []  # why rows before the training rows are bad
        self.eval_rows: list[Located] = []
        self.first = 0  # the first training row, as the number of raw rows before it
        self._hold_out(_held_out_rows(config))
        self._held_out = {key_hash(located.row) for located in self.eval_rows}
        self.train_rows = self._head()
        sources_read = [reader.describe() for reader in self.readers]
        self.source = StreamedRows(self.train_rows, sources_read, self.skipped, len(self.train_rows))

    @property
    def split(self) -> tuple[list[Located], list[Located]]:
        """The first training rows, and the held-out rows."""
        return self.train_rows, self.eval_rows

    def blocks(self, start: Position, seed: int, process: int, processes: int) -> Iterator[tuple[Position, Block]]:
        """The shares of a process in the blocks from ``start`` on, without an end, each with the position before it."""
        size, position = self.config.shuffle_buffer or BLOCK, start
        while True:
            raw = self._raw(self.first + position.row)
            while block := list(itertools.islice(raw, size)):
                if self.config.shuffle_buffer:
                    random.Random(f"{seed} {position.epoch} {position.row}").shuffle(block)
                yield position, block[(process - position.total) % processes :: processes]
                row, total = position.row + len(block), position.total + len(block)
                position = replace(position, row=row, total=total)
            position = Position(position.epoch + 1, 0, position.total)

    def rows(self, raw: RawLocated) -> list[Located]:
        """The training rows that the format makes of a raw row.

        Raises:
            DataError: the row is bad; :class:`alignkit.data.reading.WrongKindError` if it is not of the stage's type.
        """
        rows = raw.reader.accepted(raw.where, raw.content)
        return [located for located in rows if key_hash(located.row) not in self._held_out]

    def _raw(self, start: int) -> Iterator[RawLocated]:
        """The raw rows from the row number ``start`` on."""
        for reader in self.readers:
            reader.open()
        self._check_unchanged()
        yield from itertools.islice(self._in_turn(), start, None)
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        """Check that the files are those of the beginning."""
        for reader, fingerprint in zip(self.readers, self.fingerprints, strict=True):
            replace(reader.opened, fingerprint=fingerprint).check_unchanged()

    def _in_turn(self) -> Iterator[RawLocated]:
        open_readers = list(self.readers)
        while open_readers:
            for reader in list(open_readers):
                if (raw := next(reader.raw, None)) is None:
                    open_readers.remove(reader)
                else:
                    yield RawLocated(reader, *raw)

    def _hold_out(self, wanted: int) -> None:
        """Hold out the first rows."""
        raw_rows = self._raw(0)
        while len(self.eval_rows) < wanted and (raw := next(raw_rows, None)):
            self.first += 1
            try:
                self.eval_rows += raw.reader.accepted(raw.where, raw.content)
            except DataError as error:
                if self.config.on_bad_row == "error" or isinstance(error, WrongKindError):
                    raise
                self.skipped.append(str(error))

    def _head(self) -> list[Located]:
        """The first training rows."""
        head: list[Located] = []
        bad: list[str] = []
        for raw in self._raw(self.first):
            try:
                head += self.rows(raw)
            except DataError as error:
                if self.config.on_bad_row == "error" or isinstance(error, WrongKindError):
                    raise
                bad.append(str(error))
            if len(head) >= HEAD:
                break
        if head:
            return head
        path = ", ".join(reader.source.path for reader in self.readers)
        if self.eval_rows:
            raise DataError(
                f"holding out the first {len(self.eval_rows)} rows of {path} leaves none to train on. Lower "
                "data.eval_size"
            )
        bad = [*self.skipped, *bad]
        why = f"all {len(bad)} are bad. The first: {bad[0]}" if bad else "the format makes none of them"
        raise DataError(f"{path} has no rows to train on: {why}")


Block = list[RawLocated]


@dataclass(frozen=True)
class StreamedRows(Rows):
    """The first rows of a stream."""

    head: int = 0  # training rows that were read

    def describe(self) -> list[str]:
        """A line for each source, and what was read."""
        return [*super().describe(), f"read while training; the first {self.head} training rows are checked now"]


def _held_out_rows(config: DataConfig) -> int:
    """The number of rows to hold out."""
    size = config.eval_size
    if config.eval_path is not None:
        return 0
    if size is None:
        return HELD_OUT
    if size < 0 or size % 1:
        raise ConfigError(
            f"data.eval_size must be a count with data.streaming, which holds out the first rows (got {size:g})"
        )
    return int(size)
