"""Public names that a package imports on first use, so that importing the package imports nothing heavy.

A package writes its imports under ``if TYPE_CHECKING``, where type checkers and editors read them, and takes its
``__getattr__`` and ``__dir__`` (PEP 562) from :func:`lazy_imports`, which reads the same lines::

    __all__ = ["sample"]

    if TYPE_CHECKING:
        from alignkit.generation.sampling import sample
    else:
        __getattr__, __dir__ = lazy_imports(__name__, __file__)
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def lazy_imports(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of the package whose ``__init__.py`` is ``file``."""

    @functools.cache
    def imports() -> dict[str, tuple[str, str]]:
        """The module of each name that is imported under ``if TYPE_CHECKING``, and what it is called there."""
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
        blocks = (node.body for node in tree.body if isinstance(node, ast.If))
        statements = (node for block in blocks for node in block if isinstance(node, ast.ImportFrom))
        return {each.asname or each.name: (str(node.module), each.name) for node in statements for each in node.names}

    def get(name: str) -> Any:
        if name.startswith("_") or name not in imports():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, original = imports()[name]
        with without_collections():
            value = getattr(importlib.import_module(module), original)
        setattr(sys.modules[package], name, value)  # the next access no longer gets here
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *imports()})

    return get, names


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Collect no garbage in this context: while libraries are imported, it takes long and frees little."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
