"""The Python files that settings name with ``call: module:function``: a run depends on what is in them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any


def fingerprints(config: Any) -> dict[str, str]:
    """A hash of the file of each function in a config, by the function's name. Modules without a file are left out."""
    files = {call: _file_of(call.partition(":")[0]) for call in _calls(config)}
    return {call: hashlib.sha256(file.read_bytes()).hexdigest() for call, file in files.items() if file}


def _calls(table: Any) -> Iterator[str]:
    """The functions in nested tables and lists, such as those of a reward and of its parts."""
    if isinstance(table, dict) and isinstance(call := table.get("call"), str):
        yield call
    inner = table.values() if isinstance(table, dict) else table if isinstance(table, list) else ()
    for value in inner:
        yield from _calls(value)


def _file_of(module: str) -> Path | None:
    """The file of a module, which may be in the current folder.

    Nothing is imported, not even the packages that it is in: that would run their code. The current folder is not added
    to ``sys.path``: other imports would find its files.
    """
    package, *names = module.split(".")
    here = PathFinder.find_spec(package, [os.getcwd()]) if package not in sys.modules else None
    try:
        spec = here if here and here.loader else importlib.util.find_spec(package) or here
    except (ImportError, ValueError):  # importing it fails too, with an error for the user
        return None
    for name in names:
        folders = spec.submodule_search_locations if spec else None
        spec = PathFinder.find_spec(name, list(folders)) if folders else None
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None
