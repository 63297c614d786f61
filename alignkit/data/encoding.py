"""From rows to token ids in any stage, with its handling of bad rows, rows that are too long, and reports."""

from __future__ import annotations

import array
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from alignkit.data.chat_tokenizer import ANSWERS
from alignkit.data.row_encoders import RankingEncoder
from alignkit.data.spool import Mapped, copies, keep, stored
from alignkit.data.token_cache import Encoded, Encoder, encode_all
from alignkit.errors import DataError
from alignkit.protocols import Run
from alignkit.rows import Conversation, Located, Ranking, Tools

T = TypeVar("T")


def encode_each(
    run: Run, rows: Sequence[Located], encode: Callable[[Any, Counter[str]], T], skip: bool | None = None
) -> list[tuple[str, T]]:
    """The results of ``encode`` for each row, with the row's location.

    ``encode`` takes a row and a counter of messages for the user. A row for which it raises :class:`DataError` is a bad
    row. It stops the run, or is counted and removed from ``rows`` if ``data.on_bad_row`` is ``skip``. ``skip``
    overrides this setting, for rows that do not come from the ``data`` table.

    Raises:
        DataError: a row is bad, or all rows are.
    """
    skips = run.config.data.on_bad_row == "skip" if skip is None else skip
    notes, encoded, bad = Counter[str](), list[tuple[str, T]](), dict[int, str]()
    for number, (where, row) in enumerate(rows):
        try:
            encoded.append((where, encode(row, notes)))
        except DataError as error:
            bad[number] = f"{where}: {error}"
            if not skips:
                break
    _leave_out(run, rows, bad, skip)
    report(run, notes, len(rows))
    return encoded


def encode_rows(run: Run, rows: Sequence[Located], encoder: Encoder, skip: bool | None = None) -> Encoded:
    """As :func:`encode_each`, but in several processes and with a cache (see :mod:`alignkit.data.token_cache`).

    Raises:
        DataError: a row is bad, or all rows are.
    """
    skips = run.config.data.on_bad_row == "skip" if skip is None else skip
    encoded = encode_all(rows[:], encoder, skip=skips, processes=run.config.data.num_proc, say=run.say)
    bad = {number: f"{encoded.rows[number].where}: {error}" for number, error in encoded.errors().items()}
    _leave_out(run, rows, bad, skip)
    report(run, encoded.notes(), len(rows))
    return encoded


def _leave_out(run: Run, rows: Sequence[Located], bad: dict[int, str], skip: bool | None) -> None:
    """Remove bad rows from ``rows``. ``bad`` maps their numbers to reasons; ``skip`` is as in :func:`encode_each`."""
    if not bad:
        return
    first, total = next(iter(bad.values())), len(rows)
    if not (run.config.data.on_bad_row == "skip" if skip is None else skip):
        raise DataError(first)
    if len(bad) == total:
        raise DataError(f"all {total} rows are bad. The first: {first}")
    keep(rows, [number for number in range(total) if number not in bad])
    run.skipped += len(bad) if skip is None else 0
    run.say(f"skipped {len(bad)} bad rows of {total}. The first: {first}")


def report(run: Run, notes: Counter[str], rows: int) -> None:
    """Print each note with its count."""
    answers = notes.pop(ANSWERS, 0)
    for what, count in notes.items():
        run.say(f"{count} of {answers if what.startswith(ANSWERS) else rows} {what}")


class Fit:
    """Checks that the model can read sequences, each followed by ``room`` tokens; ``setting`` can lower ``room``."""

    def __init__(self, run: Run, room: int = 0, setting: str = "") -> None:
        self.run, self.room, self.setting = run, room, setting
        self.longest = 0, ""  # tokens, and where
        self.unknown: tuple[int, str] | None = None  # the first token without an embedding, and where

    def add(self, where: str, ids: Sequence[int]) -> None:
        """Add a sequence and its location."""
        self.longest = max(self.longest, (len(ids) + self.room, where))
        rows = self.run.limits.rows
        if rows is not None and self.unknown is None and ids and max(ids) >= rows:
            self.unknown = max(ids), where

    def check(self) -> None:
        """Check all sequences. A model with rotary positions can read longer ones than in training; that is reported.

        Raises:
            DataError: a token has no embedding, or a sequence is longer than the learned positions.
        """
        limits, tokenizer = self.run.limits, self.run.tokenizer
        if self.unknown is not None:
            (token, where), tokens = self.unknown, len(tokenizer)
            raise DataError(
                f"{where}: the token {tokenizer.convert_ids_to_tokens(token)!r} has the id {token}: the tokenizer "
                f"has {tokens} tokens, but the embeddings of the model have {limits.rows} rows. Save the model after "
                f"model.resize_token_embeddings({tokens}), or use the tokenizer that it came with"
            )
        length, where = self.longest
        if limits.positions is None or length <= limits.positions:
            return
        with_room = f" with {self.setting}={self.room}" if self.room else ""
        over = f"{where}: {length} tokens{with_room} are more than the {limits.positions} positions "
        if limits.learnt:
            raise DataError(f"{over}of the model. Shorten the row{_or(self.setting)}")
        self.run.say(f"{over}that the model was trained for: expect worse answers")


def check_fit(run: Run, sequences: Iterable[tuple[str, Sequence[int]]], room: int = 0, setting: str = "") -> None:
    """Check that the model can read sequences of token ids, each with its location (see :class:`Fit`)."""
    fit = Fit(run, room, setting)
    for where, ids in sequences:
        fit.add(where, ids)
    fit.check()


def check_column_fits(run: Run, encoded: Encoded, name: str, room: int = 0, setting: str = "") -> None:
    """As :func:`check_fit`, for the token ids in a column of encoded rows."""
    import pyarrow.compute as pc

    column = encoded.column(name)
    lengths, rows, suspects = pc.list_value_length(column), run.limits.rows, list[int]()
    if rows is not None and (pc.max(pc.list_flatten(column)).as_py() or 0) >= rows:
        suspects += (n for n, ids in enumerate(column) if max(ids.as_py() or [0]) >= rows)
    suspects.append(pc.index(lengths, pc.max(lengths)).as_py())
    check_fit(run, ((encoded.where(n), encoded.ids(name, n)) for n in suspects), room, setting)


def _or(setting: str) -> str:
    return f", or lower {setting}" if setting else ""


@dataclass(frozen=True)
class Branches:
    """A prompt and its answers, as token ids."""

    prompt: list[int]
    answers: list[list[int]]


@dataclass(frozen=True)
class Ranked:
    """A prompt with K >= 2 answers, not all of one rank, as token ids. Each answer holds the token that ends it."""

    prompt: Conversation
    branches: Branches
    ranks: list[float]  # lower is better; equal is a tie
    margins: list[float] | None = None  # how good each answer is, if the data have it
    tools: Tools | None = None

    def pairs(self) -> list[tuple[int, int]]:
        """All pairs of answers with different ranks, as indices, the better first."""
        number = range(len(self.ranks))
        return [(i, j) for i in number for j in number if self.ranks[i] < self.ranks[j]]


def encode_rankings(run: Run, rows: Sequence[Located], max_length: int, too_long: str) -> Sequence[Ranked]:
    """Rankings as token ids. Those without a pair are left out and counted: all ties, or answers of the same tokens.

    Raises:
        DataError: a prompt and an answer are longer than ``max_length`` and ``too_long`` is ``error``, or no ranking
            is left.
    """
    return usable_rankings(run, encoded_rankings(run, rows), max_length, too_long)


@dataclass(frozen=True)
class EncodedRanking:
    """A ranking with its prompt and its answers as token ids."""

    row: Ranking
    prompt: list[int]
    answers: list[list[int]]  # each with the token that ends it
    copy: int = 0  # 1, 2, ...: the same row again, which a weight in `data.path` repeats


def encoded_rankings(run: Run, rows: Sequence[Located]) -> Sequence[tuple[str, EncodedRanking]]:
    """All rankings as token ids, with their locations. Each is read from the encoded rows when it is accessed."""
    encoded = encode_rows(run, rows, RankingEncoder(run.tokenizer, run.stop_ids))
    copy_of = copies(encoded.rows)

    def read(record: int) -> tuple[str, EncodedRanking]:
        where, row = encoded.located(record)
        prompt, answers = encoded.ids("prompt", record), encoded.ids("answers", record)
        return where, EncodedRanking(cast(Ranking, row), prompt, answers, copy_of[encoded.number(record)])

    return Mapped(read, encoded.good())


def usable_rankings(
    run: Run, rows: Sequence[tuple[str, EncodedRanking]], max_length: int, too_long: str
) -> Sequence[Ranked]:
    """The second step of :func:`encode_rankings`: leave out rankings that cannot be trained on."""
    stage, counts, fit = run.config.stage.component.name, Counter[str](), Fit(run)
    longest = 0, ""

    def usable() -> Iterator[Ranked]:
        nonlocal longest
        for where, encoded in rows:
            row, lengths = encoded.row, [len(encoded.prompt) + len(answer) for answer in encoded.answers]
            longest = max(longest, (max(lengths), where))
            fitting = [index for index, length in enumerate(lengths) if length <= max_length]
            kept = _without_contradictions(encoded, fitting)
            counts.update(answers=len(lengths), over=len(lengths) - len(fitting), same=len(fitting) - len(kept))
            ranks = [row.ranks[index] for index in kept]
            if len(set(ranks)) < 2:
                counts.update(tied=len(kept) == len(row.answers))
                continue
            branches = Branches(encoded.prompt, [encoded.answers[index] for index in kept])
            margins = [row.margins[index] for index in kept] if row.margins else None
            for answer in branches.answers:
                fit.add(where, encoded.prompt + answer)
            yield Ranked(row.prompt, branches, ranks, margins, row.tools)

    rankings = stored(usable())
    answers = counts["answers"]
    if counts["over"]:
        over = f"{counts['over']} of {answers} answers are over {max_length} tokens"
        over += f", the longest {longest[0]} ({longest[1]})"
        if too_long == "error":
            raise DataError(f"{over}. Raise {stage}.max_length, or set {stage}.too_long=skip to leave them out")
        run.say(f"{over}: left out")
    if counts["same"]:
        run.say(
            f"{counts['same']} of {answers} answers are left out: they are the same tokens as another answer to their "
            "prompt, which has another rank"
        )
    if counts["tied"]:
        run.say(f"skipped {counts['tied']} of {len(rows)} rankings: all answers are tied")
    if not rankings:
        raise DataError("no ranking is left to train on")
    fit.check()
    return rankings


def ids_key(ids: Sequence[int]) -> bytes:
    """A short key for token ids, for dictionaries of all rows: the ids themselves would not fit into memory."""
    return hashlib.blake2b(array.array("i", ids).tobytes(), digest_size=16).digest()


def _without_contradictions(encoded: EncodedRanking, indices: list[int]) -> list[int]:
    """The answers without another answer of the same tokens and a different rank."""
    ranks: dict[tuple[int, ...], set[float]] = {}
    for index in indices:
        ranks.setdefault(tuple(encoded.answers[index]), set()).add(encoded.row.ranks[index])
    return [index for index in indices if len(ranks[tuple(encoded.answers[index])]) == 1]
