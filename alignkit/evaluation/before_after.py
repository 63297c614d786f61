"""``answers.jsonl`` in a run folder: what a policy answered to held-out prompts before training, and what now."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit.rows import Conversation
from alignkit.runs import manifest

FILE = "answers.jsonl"


def write(
    folder: Path,
    prompts: Sequence[Conversation],
    before: Sequence[str | None],
    after: Sequence[str],
    **columns: Sequence[float],
) -> None:
    """The table, a row a prompt; ``columns`` are figures of the answers after training, such as their scores.

    NaN is no figure, and null in the table.
    """
    lines = []
    for number, (prompt, former, now) in enumerate(zip(prompts, before, after, strict=True)):
        row: dict[str, Any] = {"prompt": prompt[-1]["content"], "before": former, "after": now}
        figures = {name: values[number] for name, values in columns.items()}
        row |= {name: None if math.isnan(value) else round(value, 4) for name, value in figures.items()}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    manifest.write_atomically(folder / FILE, "".join(lines))


def read_before(folder: Path) -> list[str | None]:
    """The answers from before training, for a run that is resumed; none where there is no table."""
    if not (folder / FILE).exists():
        return []
    return [json.loads(line)["before"] for line in (folder / FILE).read_text(encoding="utf-8").splitlines()]
