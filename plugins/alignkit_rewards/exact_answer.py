"""Compares the final answer in a text with the right one. Pure functions of texts."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from alignkit import Answers, DataError

# Commas and spaces are part of a number only before groups of three digits, and exponents are small: 1e999999999 fills
# the memory.
GROUPED = r"\d{1,3}(?:(?:,|\\,|\{,\}|[^\S\n])\d{3})+(?!\d)"
NUMBER = re.compile(
    r"(?:(?<![\w)])[-+][$€£¥]?)?"
    rf"(?:\d+ \d+/\d+|(?:(?:{GROUPED}|\d+)(?:\.\d+)?|\.\d+)(?:/\d+|[eE][-+]?\d{{1,2}}(?!\d))?)"
)
QUANTITY = re.compile(rf"(?P<number>{NUMBER.pattern})(?P<unit>[^\W\d_]{{2,}}[^\d\\]*(?:\^\d)?)?")
FRACTION = re.compile(r"(?:(?<=\d)())?\\[dt]?frac(?:\{(-?\d+)\}|(\d))(?:\{(-?\d+)\}|(\d))")
MINUS = str.maketrans({"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-"})
SPACES = r"(?<!\d)\s+|\s+(?!\d)|(?<=\d)\s(?=\d{3}(?!\d))"  # but for the one in "3 1/2"
IGNORED = re.compile(SPACES + r"|\\left|\\right|\\[,;!$%]|\\text|\\mathrm|\^\{?\\circ\}?|[${}%€£¥]")


class Quantity(NamedTuple):
    """A number, and its unit if there is one."""

    number: Fraction
    unit: str


def score(answers: Answers) -> list[float]:
    """1 for each answer whose final answer is that of its row, else 0."""
    rights = [fields.get("answer") for fields in answers.fields or [{}]]
    if any(right is None or not str(right).strip() for right in rights):
        raise DataError("reward 'exact-answer' needs the field 'answer' of the prompts' rows")
    return [float(is_right(text, str(right))) for text, right in zip(answers.texts, rights, strict=True)]


def is_right(text: str, right: str) -> bool:
    """Whether the final answer in ``text`` equals the right one, as a number if both are, else as written.

    Units are compared if both have one.
    """
    marked = _marked(right)
    expected = right if marked is None else marked
    wanted, found = _quantity(expected), _marked(text)
    if found is None and wanted is not None:
        numbers = NUMBER.findall(_with_fractions(text))
        found = numbers[-1] if numbers else None
    if found is None:
        return False
    given = _quantity(found)
    if given is None or wanted is None:
        return _plain(found) == _plain(expected)
    return given.number == wanted.number and (given.unit == wanted.unit or not (given.unit and wanted.unit))


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


def _with_fractions(expression: str) -> str:
    r"""With ``3/4`` for ``\frac{3}{4}``, and every minus sign as ``-``."""
    return FRACTION.sub(_fraction, expression.translate(MINUS))


def _fraction(match: re.Match[str]) -> str:
    above, below = match[2] or match[3], match[4] or match[5]
    sign = "-" if above.startswith("-") != below.startswith("-") else ""
    after_digit = " " if match[1] is not None else ""  # 3 1/2
    return f"{after_digit}{sign}{above.lstrip('-')}/{below.lstrip('-')}"


def _plain(expression: str) -> str:
    r"""Without spaces, currency and percent signs, braces, and commands that change only how it looks."""
    return IGNORED.sub("", _with_fractions(expression)).rstrip("*.").lstrip("*")


def _quantity(expression: str) -> Quantity | None:
    """What an expression is, such as ``1,234.50``, ``$7``, ``3 1/2``, ``50%`` (which is 50) or ``5 km``, or None."""
    match = QUANTITY.fullmatch(_plain(expression))
    if match is None:
        return None
    number = match["number"].replace(",", "")
    whole, _, rest = number.lstrip("+-").rpartition(" ")
    try:
        size = Fraction(whole or 0) + Fraction(rest)
    except (ValueError, ZeroDivisionError):
        return None
    return Quantity(-size if number.startswith("-") else size, (match["unit"] or "").rstrip("s."))
