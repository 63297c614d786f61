"""Decodes the elements of a JSON list one by one, so that the file need not fit into memory."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator
from typing import Any, TextIO

CHUNK = 1 << 16  # characters that are read at a time, or more for a larger element
_LONGEST = 16  # characters of a literal, an escape or the end of a number, which the end of a chunk can cut
_SPACE = re.compile(r"[ \t\n\r]*")


class NotAList(Exception):  # noqa: N818
    """The file holds a single value. The message is its type."""


class JsonStream:
    """A JSON file of which only a part is in memory. Errors are those of :func:`json.loads`."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._text, self._at = file, "", 0  # the part in memory, and what comes next in it
        self.lines_before = 0  # lines of the file before this part
        self._decode = json.JSONDecoder().raw_decode

    def elements(self, field: str) -> Iterator[tuple[Any, str]]:
        """The elements of a list, or of the list in a field of an object, each with its JSON. None in an empty file.

        Raises:
            JSONDecodeError: its position is in the part that is in memory: add ``lines_before`` to its ``lineno``.
            NotAList: there is no list.
        """
        opening, type_ = self._peek(), None
        if opening == "[":
            yield from self._list()
        elif opening == "{":
            type_ = None if (yield from self._list_in_object(field)) else "dict"
        elif opening:
            type_ = type(self._value()[0]).__name__
        if self._peek():
            raise self._error("Extra data")
        if type_:
            raise NotAList(type_)

    def _list(self) -> Iterator[tuple[Any, str]]:
        self._at += 1
        if self._peek() != "]":
            yield self._value()
            while self._peek() == ",":
                self._at += 1
                yield self._value()
        self._take("]", "Expecting ',' delimiter")

    def _list_in_object(self, field: str) -> Generator[tuple[Any, str], None, bool]:
        """Whether the object has a list in the field."""
        has_list, separator = False, "{"
        while self._peek() == separator:
            self._at += 1
            if self._peek() == "}" and separator == "{":
                break
            if self._peek() != '"':
                raise self._error("Expecting property name enclosed in double quotes")
            name = self._value()[0]
            self._take(":", "Expecting ':' delimiter")
            if name == field and has_list:
                raise self._error(f"two fields are named '{field}'")
            if name == field and self._peek() == "[":
                has_list = True
                yield from self._list()
            else:
                self._value()
            separator = ","
        self._take("}", "Expecting ',' delimiter")
        return has_list

    def _value(self) -> tuple[Any, str]:
        """The next value, and its JSON."""
        while True:
            self._peek()
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _LONGEST
                if is_cut and self._read():
                    continue
                raise
            if end > len(self._text) - _LONGEST and self._read():  # a number may go on
                continue
            written, self._at = self._text[self._at : end], end
            return value, written

    def _peek(self) -> str:
        """The next character that is not a space; empty at the end of the file."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._read():
                return self._text[self._at : self._at + 1]

    def _take(self, character: str, expecting: str) -> None:
        if self._peek() != character:
            raise self._error(expecting)
        self._at += 1

    def _error(self, message: str) -> json.JSONDecodeError:
        return json.JSONDecodeError(message, self._text, self._at)

    def _read(self) -> bool:
        """Read more of the file, and drop what has been decoded. False at the end."""
        chunk = self._file.read(max(CHUNK, len(self._text) - self._at))
        if not chunk:
            return False
        self.lines_before += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :] + chunk, 0
        return True
