"""Progress bars on terminals and in notebooks. Importing this module imports no other."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console(stderr: bool = False) -> Console:
    """A console for progress. In a notebook without ipywidgets, which bars need there, it prints plain text."""
    from rich.console import Console

    in_notebook = None if importlib.util.find_spec("ipywidgets") else False
    return Console(stderr=stderr, highlight=False, force_jupyter=in_notebook)


def has_bars(console: Console) -> bool:
    """Whether a console can show a bar that moves."""
    return not _hidden and (console.is_terminal or console.is_jupyter)


_hidden = False


@contextlib.contextmanager
def without_progress() -> Iterator[None]:
    """Show no progress bars meanwhile."""
    global _hidden
    _hidden = True
    try:
        yield
    finally:
        _hidden = False


@contextlib.contextmanager
def progress(description: str, total: int | None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on standard error, if it can. Call the yielded function to advance it."""
    from rich.progress import Progress

    shown = console(stderr=True)
    with Progress(console=shown, disable=not has_bars(shown)) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda count: bar.advance(task, count)
