"""Output for a terminal, in which control characters are visible and do nothing.

Names of runs, rows and answers may come from someone else. As raw escape sequences they could hide text, change the
title of the window, or write to the clipboard.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.text import Text

# all control characters but tab and newline, and those that change the direction of text
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_PROGRESS = re.compile(r"(?:[\r\n]|\x1b\[A)*")  # how the progress bars of libraries begin a line


def printable(text: str) -> str:
    """``text`` with control characters as escapes: ``\\x1b``."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def cell(text: str) -> Text:
    """A cell of a table of Rich, which prints ``text`` as it is, without markup and control characters."""
    from rich.text import Text

    return Text(printable(text))


class Printable:
    """A stream that writes :func:`printable` text to another one. Rich, whose sequences are its own, writes there."""

    def __init__(self, stream: TextIO, has_progress: bool = False) -> None:
        self.rich_proxied_file = stream  # the name under which Rich looks for it
        self.has_progress = has_progress

    def write(self, text: str) -> int:
        """Write a text. With ``has_progress``, it may begin as a progress bar does."""
        start = cast(re.Match[str], _PROGRESS.match(text)).end() if self.has_progress else 0
        return self.rich_proxied_file.write(text[:start] + printable(text[start:]))

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # what is written there is not seen here
            raise AttributeError(name)
        return getattr(self.rich_proxied_file, name)


def protect() -> None:
    """Make everything that this process prints on a terminal printable."""
    if sys.stdout.isatty():
        sys.stdout = cast(TextIO, Printable(sys.stdout))
    if sys.stderr.isatty():
        sys.stderr = cast(TextIO, Printable(sys.stderr, has_progress=True))
