"""The report of ``alignkit label --status``."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from alignkit.labeling import agreement, binding, items
from alignkit.labeling.labels import Label


def report(samples: Path) -> dict[str, Any]:
    """Counts, seconds an item, and agreement. Seconds are medians: a page left open for a night has no influence."""
    with contextlib.closing(binding.open_readonly(samples)) as database:
        total = database.execute("SELECT count(*) FROM items").fetchone()[0]
        states = database.execute("SELECT item, labeler, state, label FROM labels ORDER BY item, labeler").fetchall()
    labeled = [(item, labeler, Label.loads(label)) for item, labeler, state, label in states if state == "labeled"]
    skipped = [(item, labeler) for item, labeler, state, _ in states if state == "skipped"]
    done = {item for item, _, _ in labeled}
    rankings = defaultdict(list)
    for item, _, label in labeled:
        rankings[item].append(label.ranks)
    return {
        "file": str(samples),
        "store": str(items.store_file(samples)),
        "items": total,
        "done": len(done),
        "to_do": total - len(done),
        "skipped": len({item for item, _ in skipped} - done),
        "labels": len(labeled),
        "seconds_per_item": _median([label for _, _, label in labeled]),
        "labelers": [
            {
                "labeler": name,
                "done": sum(labeler == name for _, labeler, _ in labeled),
                "skipped": sum(labeler == name for _, labeler in skipped),
                "seconds_per_item": _median([label for _, labeler, label in labeled if labeler == name]),
            }
            for name in sorted({labeler for _, labeler, _, _ in states})
        ],
        "agreement": _agreement([each for each in rankings.values() if len(each) > 1]),
    }


def _median(labels: list[Label]) -> float | None:
    seconds = [label.seconds for label in labels if label.seconds is not None]
    return round(statistics.median(seconds), 1) if seconds else None


def _agreement(rankings: list[list[list[int]]]) -> dict[str, Any] | None:
    """None if no pair of answers was ordered by two labelers."""
    pairs = agreement.pair_agreement(rankings)
    if not pairs.pairs:
        return None
    values = {
        "share": pairs.share,
        "error": pairs.error,
        "alpha": agreement.krippendorff_alpha(agreement.preferences(rankings)),
    }
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return {**finite, "pairs": pairs.pairs, "items": len(rankings)}
