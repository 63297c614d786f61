"""Begins a store, or opens one and checks that it belongs to the samples and the settings of the command."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignkit.errors import ConfigError, DataError
from alignkit.labeling import assignment, items

APPLICATION = 0x616C6B6C  # "alkl", the application id in the header of the file
VERSION = 1

SCHEMA = """
    CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE items (
        id INTEGER PRIMARY KEY, k INTEGER NOT NULL, everyone INTEGER NOT NULL, digest BLOB NOT NULL,
        labels INTEGER NOT NULL DEFAULT 0
    );
    CREATE TABLE rows (item INTEGER PRIMARY KEY REFERENCES items, row TEXT NOT NULL, shown TEXT);
    CREATE TABLE leases (
        item INTEGER NOT NULL REFERENCES items, labeler TEXT NOT NULL, expires REAL NOT NULL,
        PRIMARY KEY (item, labeler)
    ) WITHOUT ROWID;
    CREATE TABLE labels (
        id INTEGER PRIMARY KEY, item INTEGER NOT NULL REFERENCES items, labeler TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('labeled', 'skipped', 'reopened')), label TEXT, seconds REAL,
        submitted REAL NOT NULL,
        UNIQUE (item, labeler)
    );
    CREATE INDEX leases_in_time ON leases (expires);
    CREATE INDEX labels_in_turn ON labels (labeler, id);
    CREATE INDEX labels_by_state ON labels (labeler, state, seconds, item);
    CREATE TABLE sessions (cookie TEXT PRIMARY KEY, labeler TEXT) WITHOUT ROWID;
"""

FLAGS = (  # of InstructGPT's labelers (arXiv 2203.02155, table 3)
    "fails to follow the instruction",
    "inappropriate for a customer assistant",
    "hallucination",
    "satisfies the constraint of the instruction",
    "sexual content",
    "violent content",
    "encourages violence, abuse, terrorism or self-harm",
    "denigrates a protected class",
    "gives harmful advice",
    "expresses an opinion",
    "expresses a moral judgment",
)


@dataclass(frozen=True)
class Settings:
    """Settings that cannot change once labeling has begun."""

    guide: str | None = None  # Markdown
    scale: int | None = 7  # grades are 1 to this; None: no grades
    flags: list[str] = field(default_factory=lambda: list(FLAGS))
    overlap: float = 0.1  # the share of items that all labelers get
    seed: int = 0


def bind(samples: Path, given: Mapping[str, Any], say: Callable[[str], None]) -> tuple[sqlite3.Connection, Settings]:
    """Open the store of a file of samples; begin it if there is none. ``given`` are the settings that the user named.

    Rows that were appended to the samples since are added. ``say`` prints a line about that.

    Raises:
        DataError: the samples are missing, a row is bad, or the store belongs to other samples.
        ConfigError: the store was begun with other settings, is not a store, or cannot be written.
    """
    read, file = items.read(samples), items.store_file(samples)
    with _named_errors(file):
        database = sqlite3.connect(file, isolation_level=None, timeout=10, check_same_thread=False)
        try:
            database.execute("BEGIN IMMEDIATE")
            settings = _settings(database, file, given)
            if value(database, "fingerprint") != read.fingerprint:
                _add_items(database, file, samples, read.items, settings, say)
            # written even if it is the same, so that a file that cannot be written is an error now
            database.execute("REPLACE INTO settings VALUES ('fingerprint', ?)", (json.dumps(read.fingerprint),))
            database.execute("COMMIT")
            database.execute("PRAGMA journal_mode = WAL")
        except BaseException:
            database.close()
            if file.exists() and not file.stat().st_size:  # it was begun just now
                file.unlink()
            raise
    return database, settings


def open_readonly(samples: Path) -> sqlite3.Connection:
    """Open the store of a file of samples to read it.

    Raises:
        ConfigError: there is none, or it is not a store.
    """
    file = items.store_file(samples)
    if not file.exists():
        raise ConfigError(f"{samples} has no labels yet: there is no {file}. Run alignkit label {samples} first")
    with _named_errors(file):
        # in a read-only folder, SQLite cannot create its log; a log that is there must be read
        has_log = os.access(file.absolute().parent, os.W_OK) or file.with_name(f"{file.name}-wal").exists()
        options = "mode=ro" if has_log else "mode=ro&immutable=1"
        database = sqlite3.connect(f"{file.absolute().as_uri()}?{options}", uri=True, check_same_thread=False)
        try:
            if _is_new(database, file):
                raise ConfigError(f"{samples} has no labels yet. Run alignkit label {samples} first")
        except BaseException:
            database.close()
            raise
    return database


def check_rows(samples: Path) -> None:
    """Check that the labels in the store of a file of samples belong to its rows. Rows may have been appended since.

    Files whose names differ only in their endings share a store. It has a copy of the rows: the file may be gone.

    Raises:
        DataError: the store belongs to other rows.
        ConfigError: there is none, or it is not a store.
    """
    with contextlib.closing(open_readonly(samples)) as database:
        if samples.exists() and value(database, "fingerprint") != (read := items.read(samples)).fingerprint:
            for _ in _new_items(database, items.store_file(samples), samples, read.items):
                pass


def _is_new(database: sqlite3.Connection, file: Path) -> bool:
    """Whether nothing is in the file yet.

    Raises:
        ConfigError: it is another program's, or another version's.
    """
    application, version = (
        database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
    )
    if application == 0 and not database.execute("SELECT 1 FROM sqlite_master").fetchone():
        return True
    if application != APPLICATION:
        raise ConfigError(f"{file} was not written by alignkit label. Move it to another folder, or rename it")
    if version != VERSION:
        raise ConfigError(f"{file} was written by an incompatible version of alignkit")
    return False


def _settings(database: sqlite3.Connection, file: Path, given: Mapping[str, Any]) -> Settings:
    """The settings of the store. A new one gets its tables."""
    if not _is_new(database, file):
        settings = Settings(**value(database, "settings"))
        _check_settings(file, settings, given)
        return settings
    settings = Settings(**given)
    for statement in SCHEMA.split(";"):
        database.execute(statement)
    database.execute(f"PRAGMA application_id = {APPLICATION}")
    database.execute(f"PRAGMA user_version = {VERSION}")
    database.execute("INSERT INTO settings VALUES ('settings', ?)", (json.dumps(asdict(settings)),))
    database.execute("INSERT INTO settings VALUES ('identity', ?)", (json.dumps(secrets.token_hex(8)),))
    return settings


def value(database: sqlite3.Connection, name: str) -> Any:
    """A stored value; None if there is none of that name."""
    row = database.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
    return json.loads(row[0]) if row else None


def _check_settings(file: Path, stored: Settings, given: Mapping[str, Any]) -> None:
    """Check that the settings that the user named are those of the store."""
    for name, wanted in given.items():
        former = getattr(stored, name)
        if former != wanted:
            option = "--no-grades" if name == "scale" and wanted is None else f"--{name}"
            was = "another guide" if name == "guide" and former else f"{_shown(former)}"
            raise ConfigError(
                f"{option}: labeling in {file} started with {was}. Leave the option out to continue, or move the "
                "file away to start again"
            )


def _shown(former: Any) -> str:
    return "none" if former is None else ", ".join(map(repr, former)) if isinstance(former, list) else str(former)


def _add_items(
    database: sqlite3.Connection,
    file: Path,
    samples: Path,
    rows: Iterator[items.Item],
    settings: Settings,
    say: Callable[[str], None],
) -> None:
    """Add the rows of the samples that are not in the store yet.

    Raises:
        DataError: as :func:`_new_items`.
    """
    number = added = 0
    for number, item in _new_items(database, file, samples, rows):
        everyone = assignment.for_everyone(settings.seed, number, settings.overlap)
        values = (number, item.k, everyone, item.digest)
        database.execute("INSERT INTO items (id, k, everyone, digest) VALUES (?, ?, ?, ?)", values)
        database.execute("INSERT INTO rows VALUES (?, ?, ?)", (number, item.row, item.shown))
        added += 1
    if 0 < added < number:
        say(f"{samples} has {added} new rows, which are added to {file}")


def _new_items(
    database: sqlite3.Connection, file: Path, samples: Path, rows: Iterator[items.Item]
) -> Iterator[tuple[int, items.Item]]:
    """The rows of the samples that are not in the store yet, each with its number, from 1.

    Raises:
        DataError: there are no rows, or they do not begin with those that are in the store.
    """
    stored = database.execute("SELECT digest FROM items ORDER BY id")
    changed = f"The labels in {file} belong to other rows. Restore {samples}, or move {file} away to start again"
    count = 0
    for count, item in enumerate(rows, 1):
        former = stored.fetchone()
        if former is None:
            yield count, item
        elif former[0] != item.digest:
            raise DataError(f"{samples}: row {count} has changed. {changed}")
    if stored.fetchone() is not None:
        raise DataError(f"{samples}: only {count} rows are left. {changed}")
    if not count:
        raise DataError(f"{samples} has no rows to label")


@contextlib.contextmanager
def _named_errors(file: Path) -> Iterator[None]:
    """Name the file in errors of SQLite."""
    try:
        yield
    except sqlite3.Error as error:
        writable = os.access(file.absolute().parent, os.W_OK)
        raise ConfigError(f"{file} cannot be used: {error if writable else 'its folder is read-only'}") from None
