"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def expand(name: str) -> Path:
    """``name`` with ``~`` as the home folder. A ``~user`` that does not exist stays as it is, and so is not found."""
    return Path(os.path.expanduser(name))  # Path.expanduser raises where there is no such user
