"""Errors that the command line shows as one line: what, who, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AlignkitError(Exception):
    """An error that the user can fix. Its message is one line; the command line shows no traceback."""


class ConfigError(AlignkitError):
    """An invalid key, value or combination of components in the configuration."""


class DataError(AlignkitError):
    """An invalid data source, or an invalid row in it."""


class PluginError(AlignkitError):
    """A plugin that is missing, broken, or in conflict with another plugin."""


class UnavailableError(AlignkitError):
    """A server that a run needs does not answer as it should. The run stops with a checkpoint, and can be resumed."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``" Did you mean 'ppo'?"`` with the known word closest to ``word``; an empty string if none is close."""
    close = difflib.get_close_matches(str(word), [each for each in known if each != word], n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def suggestion(message: str, word: str, known: Iterable[str]) -> str:
    """``message``, and :func:`did_you_mean` as another sentence if a known word is close."""
    hint = did_you_mean(word, known)
    return f"{message}.{hint}" if hint else message


def one_line(error: BaseException) -> str:
    """The type and the message of an error on one line, such as ``"ValueError: invalid literal"``."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")
