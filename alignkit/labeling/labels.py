"""A label: the ranks, grades and flags that a labeler gave to the answers of an item. Checked when it is submitted."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

FIELDS = ("ranks", "grades", "flags", "seconds")


NAME_LIMIT = 64  # characters of a labeler's name


class InvalidLabelError(ValueError):
    """A submitted label is not valid. The message is one sentence."""


@dataclass(frozen=True)
class Label:
    """A submitted label of K answers, in their order in the row."""

    ranks: list[int]  # 0 is best, equal ranks are a tie, no rank is skipped
    grades: list[int | None]
    flags: list[list[str]]
    seconds: float | None

    def dumps(self) -> str:
        """This label as JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @staticmethod
    def loads(text: str) -> Label:
        """The label of a JSON text."""
        return Label(**json.loads(text))

    def as_shown(self, order: Sequence[int]) -> dict[str, Any]:
        """This label as the page sends it. ``order`` is the blind order of the answers."""
        places = {str(place): answer for place, answer in enumerate(order)}
        grades = {place: self.grades[answer] for place, answer in places.items()}
        return {
            "ranks": {place: self.ranks[answer] for place, answer in places.items()},
            "grades": {place: grade for place, grade in grades.items() if grade is not None},
            "flags": {place: self.flags[answer] for place, answer in places.items() if self.flags[answer]},
            "seconds": self.seconds,  # the page adds those of a correction
        }


def labeler_name(name: Any) -> str:
    """A labeler's name, with single spaces, and in Unicode's normal form C: some keyboards send é as two characters.

    Raises:
        InvalidLabelError: it is not a text, or empty, too long, or not printable.
    """
    words = " ".join(unicodedata.normalize("NFC", name).split()) if isinstance(name, str) else ""
    if not words.isprintable() or not 1 <= len(words) <= NAME_LIMIT:
        raise InvalidLabelError(f"a labeler's name must have 1 to {NAME_LIMIT} characters")
    return words


def submitted(body: Any, order: Sequence[int], scale: int | None, flags: Sequence[str]) -> Label:
    """The label of a request's body. ``order`` is the blind order of the answers on the page.

    Raises:
        InvalidLabelError: it is not complete, or not valid.
    """
    if not isinstance(body, dict):
        raise InvalidLabelError("a label must be an object")
    if unknown := [name for name in body if name not in FIELDS]:
        raise InvalidLabelError(f"unknown field {unknown[0]!r}; known: {', '.join(FIELDS)}")
    places = {str(place): answer for place, answer in enumerate(order)}
    ranks = _by_answer(body, "ranks", places, _is_int)
    if len(ranks) != len(places):
        raise InvalidLabelError("every answer needs a rank")
    grades = _by_answer(body, "grades", places, lambda value: _is_int(value) and 1 <= value <= (scale or 0))
    ticked = _by_answer(body, "flags", places, lambda value: isinstance(value, list) and all(f in flags for f in value))
    answers = range(len(order))
    return Label(
        ranks=dense([ranks[answer] for answer in answers]),
        grades=[grades.get(answer) for answer in answers],
        flags=[[flag for flag in flags if flag in ticked.get(answer, [])] for answer in answers],
        seconds=_seconds(body.get("seconds")),
    )


def dense(ranks: Sequence[float]) -> list[int]:
    """Ranks as 0, 1, 2, ... without gaps; ties stay ties."""
    order = {rank: place for place, rank in enumerate(sorted(set(ranks)))}
    return [order[rank] for rank in ranks]


def _by_answer(
    body: Mapping[str, Any], field: str, places: Mapping[str, int], valid: Callable[[Any], bool]
) -> dict[int, Any]:
    values = body.get(field, {})
    if not isinstance(values, dict):
        raise InvalidLabelError(f"'{field}' must be an object with the ids of answers")
    for place, value in values.items():
        if place not in places:
            raise InvalidLabelError(f"'{field}' has an unknown answer {place!r}")
        if not valid(value):
            raise InvalidLabelError(f"'{field}' has an invalid value for answer {place!r}")
    return {places[place]: value for place, value in values.items()}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def _seconds(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
        raise InvalidLabelError("'seconds' must be a number of seconds")
    return float(value)
