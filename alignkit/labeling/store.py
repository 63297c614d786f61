"""What labelers submitted, in one SQLite file beside the samples. A submitted label survives a killed process.

Every change is one transaction, and several processes may use one store at a time. The store has a copy of the samples,
so that they need not be in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from alignkit.labeling import assignment, binding, items
from alignkit.labeling.binding import Settings
from alignkit.labeling.labels import Label

LEASE = 3600.0  # seconds for which an item that one labeler has open is not given to another

# `own` is what the labeler did with an item. An item that is open is not done yet, and the labeler may have it.
OPEN = """
    FROM items LEFT JOIN labels own ON own.item = items.id AND own.labeler = :labeler
    WHERE (own.state IS NULL OR own.state = 'reopened') AND (
        items.everyone OR (
            NOT EXISTS (SELECT 1 FROM labels WHERE item = items.id AND labeler != :labeler AND state = 'labeled')
            AND NOT EXISTS (SELECT 1 FROM leases WHERE item = items.id AND labeler != :labeler AND expires > :now)
        )
    )
"""


class Progress(NamedTuple):
    """The progress of one labeler."""

    done: int
    skipped: int
    total: int  # with the items that are left for this labeler
    seconds_per_item: float | None  # the median


class Shown(NamedTuple):
    """An item as one labeler sees it."""

    id: int
    prompt: list[dict[str, str]]
    answers: list[str]  # in the blind order
    order: list[int]  # for each answer, its index in the row
    label: Label | None  # what this labeler submitted


class Store:
    """The labels of one file of samples. Safe to use from several threads."""

    def __init__(self, file: Path, database: sqlite3.Connection, settings: Settings) -> None:
        self.file, self.settings = file, settings
        self._database = database
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def _query(self, query: str, **values: Any) -> list[Any]:
        with self._lock:
            return self._database.execute(query, values).fetchall()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    # --- sessions ---------------------------------------------------------------------------------------------------

    def new_session(self, cookie: str, labeler: str | None) -> None:
        """Store a session, so that a browser stays signed in when the server restarts."""
        with self._transaction() as database:
            database.execute("INSERT INTO sessions VALUES (?, ?)", (_hash(cookie), labeler))

    def has_session(self, cookie: str) -> bool:
        """Whether a cookie is one of this store."""
        return bool(self._query("SELECT 1 FROM sessions WHERE cookie = :cookie", cookie=_hash(cookie)))

    def labeler(self, cookie: str) -> str | None:
        """The labeler of a session; None if there is no name yet."""
        rows = self._query("SELECT labeler FROM sessions WHERE cookie = :cookie", cookie=_hash(cookie))
        return rows[0][0] if rows else None

    def set_labeler(self, cookie: str, labeler: str) -> bool:
        """Bind a session to a labeler. False if it is another labeler's."""
        with self._transaction() as database:
            query = "UPDATE sessions SET labeler = ?1 WHERE cookie = ?2 AND coalesce(labeler, ?1) = ?1"
            return database.execute(query, (labeler, _hash(cookie))).rowcount == 1

    def port(self) -> int:
        """The port of the last server. A browser keeps its drafts and its cookie only at the same port."""
        return int(binding.value(self._database, "port") or 0)

    def set_port(self, port: int) -> None:
        """Remember the port of the server."""
        with self._transaction() as database:
            database.execute("REPLACE INTO settings VALUES ('port', ?)", (str(port),))

    # --- items ------------------------------------------------------------------------------------------------------

    def next(self, labeler: str) -> Shown | None:
        """The next item for a labeler, which no other labeler gets for now. None if nothing is left."""
        now = time.time()
        first = "ORDER BY own.state IS NULL, leased IS NULL, items.id LIMIT 1"  # an item that is open in another tab
        leased = "(SELECT 1 FROM leases WHERE item = items.id AND labeler = :labeler AND expires > :now) AS leased"
        with self._transaction() as database:
            row = database.execute(
                f"SELECT items.id, {leased} {OPEN} {first}", {"labeler": labeler, "now": now}
            ).fetchone()
            if row is None:
                return None
            _lease(database, row[0], labeler, now + LEASE)
        return self.shown(row[0], labeler)

    def shown(self, item: int, labeler: str) -> Shown | None:
        """An item that the labeler has or had; None if there is no such item."""
        query = """
            SELECT k, row, shown, label FROM leases
            JOIN items ON items.id = leases.item JOIN rows ON rows.item = items.id
            LEFT JOIN labels ON labels.item = leases.item AND labels.labeler = leases.labeler
            WHERE leases.item = :item AND leases.labeler = :labeler
        """
        rows = self._query(query, item=item, labeler=labeler)
        if not rows:
            return None
        k, row, shown, label = rows[0]
        prompt, answers = items.texts(row, shown)
        order = assignment.blind_order(self.settings.seed, labeler, item, k)
        return Shown(item, prompt, [answers[i] for i in order], order, Label.loads(label) if label else None)

    def submit(self, item: int, labeler: str, label: Label) -> None:
        """Store the label of an item that the labeler has or had. The same item again replaces the former label."""
        self._finish(item, labeler, "labeled", label.dumps())

    def skip(self, item: int, labeler: str) -> None:
        """Leave an item to other labelers."""
        self._finish(item, labeler, "skipped", None)

    def _finish(self, item: int, labeler: str, state: str, label: str | None) -> None:
        query = """
            INSERT INTO labels (item, labeler, state, label, submitted) VALUES (?, ?, ?, ?, ?)
            ON CONFLICT (item, labeler) DO UPDATE
            SET state = excluded.state, label = excluded.label, submitted = excluded.submitted
        """
        now = time.time()
        with self._transaction() as database:
            database.execute(query, (item, labeler, state, label, now))
            _lease(database, item, labeler, now)

    def undo(self, labeler: str) -> Shown | None:
        """Reopen the labeler's latest label or skip; None if there is none. It counts again once it is submitted."""
        latest = "SELECT item FROM labels WHERE labeler = ? AND state != 'reopened' ORDER BY id DESC LIMIT 1"
        with self._transaction() as database:
            row = database.execute(latest, (labeler,)).fetchone()
            if row is None:
                return None
            query = "UPDATE labels SET state = 'reopened' WHERE item = ? AND labeler = ?"
            database.execute(query, (row[0], labeler))
            _lease(database, row[0], labeler, time.time() + LEASE)
        return self.shown(row[0], labeler)

    def progress(self, labeler: str) -> Progress:
        """The progress of a labeler."""
        states = "SELECT state, json_extract(label, '$.seconds') FROM labels WHERE labeler = :labeler"
        own = self._query(states, labeler=labeler)
        left = self._query(f"SELECT count(*) {OPEN}", labeler=labeler, now=time.time())[0][0]
        seconds = [seconds for state, seconds in own if state == "labeled" and seconds is not None]
        done, skipped = (sum(state == wanted for state, _ in own) for wanted in ("labeled", "skipped"))
        return Progress(done, skipped, done + skipped + left, statistics.median(seconds) if seconds else None)


def _lease(database: sqlite3.Connection, item: int, labeler: str, expires: float) -> None:
    database.execute("REPLACE INTO leases (item, labeler, expires) VALUES (?, ?, ?)", (item, labeler, expires))


def _hash(cookie: str) -> str:
    return hashlib.sha256(cookie.encode()).hexdigest()
