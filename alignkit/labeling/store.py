"""The store of submitted labels, in one SQLite file beside the samples. A submitted label survives a killed process.

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
import unicodedata
from collections.abc import Iterator
from typing import Any, NamedTuple

from alignkit.labeling import assignment, binding, items
from alignkit.labeling.binding import Settings
from alignkit.labeling.labels import Label

LEASE = 3600.0  # seconds for which an item that one labeler has open is not given to another

# An item that is open is not done yet, and the labeler may have it.
OPEN = """
    FROM items WHERE (everyone OR labels = 0)
    AND id NOT IN (SELECT item FROM labels WHERE labeler = :labeler AND state != 'reopened')
    AND (everyone OR id NOT IN (SELECT item FROM leases WHERE expires > :now AND labeler != :labeler))
"""
OWN = """
    AND id IN (SELECT item FROM leases WHERE expires > :now AND labeler = :labeler)
    ORDER BY id NOT IN (SELECT item FROM labels WHERE labeler = :labeler AND state = 'reopened'), id LIMIT 1
"""


class Progress(NamedTuple):
    """The progress of one labeler."""

    done: int
    skipped: int
    total: int  # with the items that are left for this labeler
    seconds_per_item: float | None  # the median


class Session(NamedTuple):
    """A browser that is signed in."""

    labeler: str | None  # None until a name is given


class Shown(NamedTuple):
    """An item as one labeler sees it."""

    number: int  # the number of the row, from 1
    id: str  # what the page calls it
    prompt: list[dict[str, str]]
    answers: list[str]  # in the blind order
    order: list[int]  # for each answer, its index in the row
    label: Label | None  # what this labeler submitted


class Store:
    """The labels of one file of samples. Safe to use from several threads."""

    def __init__(self, database: sqlite3.Connection, settings: Settings) -> None:
        self.settings = settings
        self._database = database
        self._identity = binding.value(database, "identity")
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:  # SQLite has ended it if the disk is full
                    self._database.execute("ROLLBACK")
                raise

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

    def session(self, cookie: str) -> Session | None:
        """The session of a cookie; None if there is none."""
        rows = self._query("SELECT labeler FROM sessions WHERE cookie = :cookie", cookie=_hash(cookie))
        return Session(rows[0][0]) if rows else None

    def spelled(self, labeler: str) -> str:
        """A name as a labeler has written it before: the same person may begin it with a capital or not."""
        known = [name for (name,) in self._query("SELECT DISTINCT labeler FROM leases")]
        wanted = labeler.casefold()
        return next((name for name in known if unicodedata.normalize("NFC", name).casefold() == wanted), labeler)

    def set_labeler(self, cookie: str, labeler: str) -> None:
        """Give the session of a cookie to a labeler."""
        with self._transaction() as database:
            database.execute("UPDATE sessions SET labeler = ? WHERE cookie = ?", (labeler, _hash(cookie)))

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
        values = {"labeler": labeler, "now": time.time()}
        with self._transaction() as database:
            row = database.execute(f"SELECT id {OPEN} {OWN}", values).fetchone()  # open in another tab, or reopened
            row = row or database.execute(f"SELECT id {OPEN} ORDER BY id LIMIT 1", values).fetchone()
            if row is None:
                return None
            _lease(database, row[0], labeler, time.time() + LEASE)
        return self.shown(row[0], labeler)

    def id_of(self, item: int, labeler: str) -> str:
        """The identifier of an item on the page of a labeler.

        The page of another labeler or store, such as a tab of yesterday, has other ids: its answers are in another
        order.
        """
        return f"{item}-{_hash(f'{self._identity} {item} {labeler}')[:16]}"

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
        answers = [answers[index] for index in order]
        given = Label.loads(label) if label else None
        return Shown(item, self.id_of(item, labeler), prompt, answers, order, given)

    def submit(self, item: int, labeler: str, label: Label) -> None:
        """Store the label of an item that the labeler has or had. The same item again replaces the former label."""
        self._finish(item, labeler, "labeled", label.dumps(), label.seconds)

    def skip(self, item: int, labeler: str) -> None:
        """Leave an item to other labelers. A label that was submitted, such as in another tab, stays."""
        self._finish(item, labeler, "skipped", None, None)

    def _finish(self, item: int, labeler: str, state: str, label: str | None, seconds: float | None) -> None:
        query = """
            INSERT INTO labels (item, labeler, state, label, seconds, submitted) VALUES (?, ?, ?, ?, ?, ?)
            ON CONFLICT (item, labeler) DO UPDATE
            SET state = excluded.state, label = coalesce(excluded.label, label), seconds = excluded.seconds,
                submitted = excluded.submitted
            WHERE excluded.label IS NOT NULL OR state != 'labeled'
        """
        now = time.time()
        with self._transaction() as database:
            database.execute(query, (item, labeler, state, label, seconds, now))
            _count_labels(database, item)
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
            _count_labels(database, row[0])
            _lease(database, row[0], labeler, time.time() + LEASE)
        return self.shown(row[0], labeler)

    def progress(self, labeler: str) -> Progress:
        """The progress of a labeler."""
        own = self._query("SELECT state, seconds FROM labels WHERE labeler = :labeler", labeler=labeler)
        left = self._query(f"SELECT count(*) {OPEN}", labeler=labeler, now=time.time())[0][0]
        seconds = [seconds for state, seconds in own if state == "labeled" and seconds is not None]
        done, skipped = (sum(state == wanted for state, _ in own) for wanted in ("labeled", "skipped"))
        return Progress(done, skipped, done + skipped + left, statistics.median(seconds) if seconds else None)


def _lease(database: sqlite3.Connection, item: int, labeler: str, expires: float) -> None:
    database.execute("REPLACE INTO leases (item, labeler, expires) VALUES (?, ?, ?)", (item, labeler, expires))


def _count_labels(database: sqlite3.Connection, item: int) -> None:
    counted = "(SELECT count(*) FROM labels WHERE item = ?1 AND state = 'labeled')"
    database.execute(f"UPDATE items SET labels = {counted} WHERE id = ?1", (item,))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
