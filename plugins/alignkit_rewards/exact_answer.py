"""Compares the final answer in a text with the right one. Pure functions of texts."""

from __future__ import annotations

import re
from fractions import Fraction

from alignkit import Answers, DataError

# A comma is part of a number only before groups of three digits, and exponents are small: 1e999999999 fills the memory.
NUMBER = re.compile(
    r"(?:(?<![\w)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+|[eE][-+]?\d{1,2}(?!\d))?"
)
UNIT = re.compile(r"(?<=\d)(?:\\text\{[^{}]*\}|\s+[^\W\d_]{2,}[^\d\\]*)$")  # after a number
FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(-?\d+)\}")
IGNORED = re.compile(r"\s|\\left|\\right|\\[,;!]|\\text|\\%|[${}%]")


def score(answers: Answers) -> list[float]:
    """1 for each answer whose final answer is that of its row, else 0."""
    rights = [fields.get("answer") for fields in answers.fields or [{}]]
    if any(right is None or not str(right).strip() for right in rights):
        raise DataError("reward 'exact-answer' needs the field 'answer' of the prompts' rows")
    return [float(is_right(text, str(right))) for text, right in zip(answers.texts, rights, strict=True)]


def is_right(text: str, right: str) -> bool:
    """Whether the final answer in ``text`` equals the right one, as a number if both are, else as written."""
    marked = _marked(right)
    expected = right.strip() if marked is None else marked
    found = _marked(text)
    if found is None and _number(expected) is not None:
        numbers = NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
        found = numbers[-1] if numbers else None
    if found is None:
        return False
    given, wanted = _number(UNIT.sub("", found)), _number(expected)
    return _plain(found) == _plain(expected) if given is None or wanted is None else given == wanted


def _marked(text: str) -> str | None:
    r"""What is in the last ``\boxed{...}``, or else after the last ``####``; None without either."""
    _, box, rest = text.rpartition("\\boxed{")
    if not box:
        _, mark, rest = text.rpartition("####")
        return rest.strip().partition("\n")[0] if mark else None
    depth = 1
    for end, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:end]
    return rest  # the answer was cut off


def _plain(expression: str) -> str:
    r"""Without spaces, dollar and percent signs, braces, and commands that change only how it looks."""
    fractions = FRACTION.sub(r"\1/\2", expression.replace("\N{MINUS SIGN}", "-"))
    return IGNORED.sub("", fractions).rstrip(".")


def _number(expression: str) -> Fraction | None:
    """The number that an expression is, such as ``1,234.50``, ``$7``, ``3/4`` or ``50%`` (which is 50), or None."""
    plain = _plain(expression)
    if NUMBER.fullmatch(plain) is None:
        return None
    try:
        return Fraction(plain.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None
