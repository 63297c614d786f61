"""``evaluation.json`` in a run folder: what ``alignkit evaluate`` measured on the run. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.runs import manifest, record

FILE = "evaluation.json"
KEYS = {  # a later row replaces an earlier one with the same values of these
    "perplexity": ("data",),
    "tasks": ("task", "metric", "filter", "num_fewshot", "apply_chat_template"),
}


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each table, ``perplexity`` and ``tasks``. Both are empty if nothing was evaluated."""
    try:
        content = record.loads((folder / FILE).read_text(encoding="utf-8"))
        return {table: [dict(row) for row in content.get(table, [])] for table in KEYS}
    except (OSError, ValueError, TypeError, AttributeError):  # none, or not a file of ours
        return {table: [] for table in KEYS}


def add(folder: Path, measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Add rows to the tables. A row that measures the same as an earlier one replaces it."""
    tables, today = read(folder), time.strftime("%Y-%m-%d", time.gmtime())
    for table, keys in KEYS.items():
        new = [{**row, "evaluated": today} for row in measured.get(table, [])]
        replaced = [[row.get(key) for key in keys] for row in new]
        tables[table] = [row for row in tables[table] if [row.get(key) for key in keys] not in replaced] + new
    manifest.write_json(folder / FILE, tables)
