"""Paths in settings."""

from __future__ import annotations

import os
from pathlib import Path


def expand(name: str | os.PathLike[str]) -> Path:
    """Expand ``~`` to the home folder. The ``~user`` of an unknown user is left unchanged."""
    return Path(os.path.expanduser(name))  # Path.expanduser raises for an unknown user


def named(folder: Path) -> Path:
    """The folder by a path that ends in its name, unlike ``.`` and ``..``."""
    return Path(os.path.abspath(folder)) if folder.name in ("", "..") else folder
