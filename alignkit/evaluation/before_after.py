"""``answers.jsonl`` in a run folder: the policy's answers to held-out prompts, before training and now."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit.rows import Conversation
from alignkit.runs import manifest

FILE = "answers.jsonl"


def write_answers(
    folder: Path,
    prompts: Sequence[Conversation],
    before: Sequence[str | None],
    after: Sequence[str],
    **columns: Sequence[float],
) -> None:
    """Write the table, one row per prompt; ``columns`` are metrics of the answers now, such as their scores.

    NaN is written as null.
    """
    lines = []
    for number, (prompt, first, last) in enumerate(zip(prompts, before, after, strict=True)):
        row: dict[str, Any] = {"prompt": prompt[-1]["content"], "before": first, "after": last}
        metrics = {name: values[number] for name, values in columns.items()}
        row |= {name: None if math.isnan(value) else round(value, 4) for name, value in metrics.items()}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    manifest.write_atomically(folder / FILE, "".join(lines))


def read_answers_before(folder: Path) -> list[str | None]:
    """The answers from before training, for a run that is resumed; empty if there is no table."""
    if not (folder / FILE).exists():
        return []
    return [json.loads(line)["before"] for line in (folder / FILE).read_text(encoding="utf-8").splitlines()]
