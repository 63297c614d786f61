"""Replaces functions of modules while a plan runs the code of training on tensors without data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(module: Any, **replacements: Any) -> Iterator[None]:
    """Set attributes of ``module`` in this context, in all threads."""
    originals = {name: getattr(module, name) for name in replacements}
    for name, replacement in replacements.items():
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)
