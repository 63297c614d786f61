"""Errors that the command line shows as one line: what, who, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AlignkitError(Exception):
    """Something that the user can mend. Its text is one line and needs no traceback."""


class ConfigError(AlignkitError):
    """A key, a value or a combination of components in the configuration."""


class DataError(AlignkitError):
    """A data source or a row in it."""


class PluginError(AlignkitError):
    """A plugin that is missing, broken, or in conflict with another."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``" Did you mean 'ppo'?"`` for the closest known word, else an empty string."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def one_line(error: BaseException) -> str:
    """``"ValueError: its text"``, folded onto one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")
