"""Verdicts in an SQLite file, so that a command that is killed or fails asks nothing twice.

Rows are a key and ranks. The key is a hash of the judge, its settings and the question, so the file holds no text. Each
verdict is committed when it arrives; several processes may read and write at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

from alignkit.batches import Question
from alignkit.errors import AlignkitError
from alignkit.judging.comparing import Verdict


def default_file() -> Path:
    """``alignkit/verdicts.sqlite`` in the user's cache folder: ``$XDG_CACHE_HOME``, or ``~/.cache``."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "alignkit" / "verdicts.sqlite"


class Store:
    """Verdicts by key, in a file, or in memory without one."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        with self._errors():
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(file or ":memory:", timeout=60, isolation_level=None)
            weakref.finalize(self, self._connection.close)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, ranks TEXT) STRICT")

    def read(self, keys: Iterable[str]) -> dict[str, Verdict]:
        """The verdicts that are stored under these keys."""
        stored: dict[str, Verdict] = {}
        with self._errors():
            for key in keys:
                row = self._connection.execute("SELECT ranks FROM verdicts WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    stored[key] = json.loads(row[0])
        return stored

    def write(self, key: str, verdict: Verdict) -> None:
        """Store a verdict, None too."""
        ranks = None if verdict is None else [float(rank) for rank in verdict]
        with self._errors():
            self._connection.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", (key, json.dumps(ranks)))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            remedy = "Remove the file, or set XDG_CACHE_HOME to another folder"
            raise AlignkitError(f"verdicts cannot be stored in {self.file}: {error}. {remedy}") from error


def key_of(identity: str | None, question: Question) -> str:
    """The key of a question to the judge with this identity."""
    fields = [] if question.fields is None else [question.fields]
    text = json.dumps([identity, question.prompt, question.answers, *fields], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
