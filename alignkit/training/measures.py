"""The size of a run for its manifest: tokens of its rows."""

from __future__ import annotations

import contextlib
import statistics

from alignkit.errors import DataError
from alignkit.protocols import Run
from alignkit.runs import row_checks

ROWS = 1000  # that are measured, evenly spaced


def row_lengths(run: Run) -> dict[str, float] | None:
    """The median and the largest number of tokens of the training rows. None for rows of a plugin's own type.

    An answer counts with its prompt; each answer of a ranking counts. ``rows`` is the number of rows measured.
    """
    step = max(1, len(run.train_rows) // ROWS)
    rows = [run.train_rows[index].row for index in range(0, len(run.train_rows), step)]
    lengths = list[int]()
    for row in rows:
        with contextlib.suppress(DataError):  # a row that was skipped
            lengths += row_checks.lengths_of(run.config, run.tokenizer, row)
    if not lengths:
        return None
    return {"rows": len(rows), "median": statistics.median(lengths), "longest": max(lengths)}
