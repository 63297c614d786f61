"""Tables of results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alignkit.cli import terminal


def show(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """Print a table. The first ``left`` columns are text, which may be folded; the others are aligned to the right."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    for number, heading in enumerate(headings):
        if number < left:
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*map(terminal.cell, row))
    console = Console(highlight=False)
    console.print(table) if console.is_terminal else Console(highlight=False, width=160).print(table)


def with_error(row: Mapping[str, Any], name: str, form: str) -> str:
    """A metric of a row with its standard error, if it has one; empty if the metric is None."""
    if row.get(name) is None:
        return ""
    error = row.get(f"{name}_error")
    return form.format(row[name]) + ("" if error is None else f" ± {form.replace('+', '').format(error)}")
