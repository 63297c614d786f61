"""Paths in settings."""

from __future__ import annotations

import os
from pathlib import Path


def expand(name: str) -> Path:
    """Expand ``~`` to the home folder. The ``~user`` of an unknown user is left unchanged."""
    return Path(os.path.expanduser(name))  # Path.expanduser raises for an unknown user
