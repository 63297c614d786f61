"""Labels as rows of the format ``ranking``, with all fields of the samples."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from alignkit.errors import ConfigError
from alignkit.labeling import binding, items
from alignkit.labeling.labels import Label, dense
from alignkit.runs import manifest

MERGES = ("mean", "apart")

LABELED = """
    SELECT labels.item, rows.row, labels.labeler, labels.label FROM labels JOIN rows ON rows.item = labels.item
    WHERE labels.state = 'labeled' ORDER BY labels.item, labels.labeler
"""


def lines(samples: Path, merge: str) -> Iterator[str]:
    """The rankings as JSON Lines, in the order of the samples.

    ``merge`` is ``"mean"``, one ranking per item by the mean rank of its labelers, or ``"apart"``, one per labeler.
    ``labels`` of each row has who ranked it, with ranks, grades, flags and seconds.
    """
    with contextlib.closing(binding.open_readonly(samples)) as database:
        labeled = database.execute(LABELED)
        for _, group in itertools.groupby(labeled, key=lambda each: each[0] if merge == "mean" else each[0::2]):
            rows = list(group)
            yield _line(rows[0][1], [(labeler, Label.loads(label)) for _, _, labeler, label in rows])


def _line(row: str, given: Sequence[tuple[str, Label]]) -> str:
    labels = [{"labeler": labeler, **vars(label)} for labeler, label in given]
    content = {**json.loads(row), "ranks": mean_ranks([label.ranks for _, label in given]), "labels": labels}
    return json.dumps(manifest.plain_json(content), ensure_ascii=False) + "\n"


def mean_ranks(rankings: Sequence[Sequence[float]]) -> list[int]:
    """Merge rankings of the same answers: order them by their mean rank. Equal means are a tie.

    Tied answers share the mean of the places that they take, so that every labeler has the same weight.
    """
    placed = [_places(ranks) for ranks in rankings]
    return dense([sum(places) for places in zip(*placed, strict=True)])  # sums of halves are exact


def _places(ranks: Sequence[float]) -> list[float]:
    return [sum(other < rank for other in ranks) + (ranks.count(rank) - 1) / 2 for rank in ranks]


def write(samples: Path, output: Path, merge: str) -> tuple[int, int]:
    """Write the rankings to a file. Returns how many there are, and how many of them tie all answers.

    Raises:
        ConfigError: nothing is labeled yet, or the file exists and is not an earlier export of these samples.
    """
    if output.exists() and not _is_export(samples, output):
        raise ConfigError(f"--export {output} exists and is not an export of {samples}. Choose another file")
    rows = list(lines(samples, merge))
    if not rows:
        raise ConfigError(f"{samples} has no labels yet. Run alignkit label {samples} first")
    manifest.write_atomically(output, "".join(rows))
    return len(rows), sum(len(set(json.loads(row)["ranks"])) == 1 for row in rows)


def _is_export(samples: Path, file: Path) -> bool:
    """Whether the first row of a file is one of these samples, with ranks and labels."""
    try:
        with file.open(encoding="utf-8") as content:
            row = json.loads(content.readline())
        own = {name: value for name, value in row.items() if name not in items.EXPORTED}
        digest = items.digest(items.as_json(own))
    except (OSError, ValueError, AttributeError):
        return False
    with contextlib.closing(binding.open_readonly(samples)) as database:
        same = "SELECT 1 FROM items WHERE digest = ?"
        return len(own) < len(row) and bool(database.execute(same, (digest,)).fetchone())
