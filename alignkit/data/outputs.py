"""Checks the files that a command is to write, before it reads or computes anything."""

from __future__ import annotations

from pathlib import Path

from alignkit import paths
from alignkit.data.readers import COMPRESSED, READERS
from alignkit.errors import ConfigError


def check(option: str, file: Path, *inputs: Path | str) -> None:
    """Check a file that the command writes.

    Raises:
        ConfigError: it is one of the ``inputs``, which are paths or hub ids, or its folder does not exist.
    """
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"{option} {file}: no folder {file.parent}")
    if file.exists() and any(each.exists() and file.samefile(each) for each in map(paths.expand, inputs)):
        raise ConfigError(f"{option} {file}: the command reads this file. Choose another one")


def check_rows(option: str, file: Path, *inputs: Path | str) -> None:
    """:func:`check`, for rows: JSON Lines without compression.

    Raises:
        ConfigError: also if the file would be read as something else because of its ending.
    """
    if file.suffix != ".jsonl" and file.suffix in (*READERS, *COMPRESSED):
        raise ConfigError(f"{option} {file}: the rows are written as JSON Lines. Choose a name that ends in .jsonl")
    check(option, file, *inputs)
