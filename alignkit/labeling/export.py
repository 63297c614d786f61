"""Labels as rows of the format ``ranking``, with all fields of the samples."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from alignkit.errors import ConfigError
from alignkit.labeling import binding
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
    return json.dumps(content, ensure_ascii=False) + "\n"


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
        ConfigError: nothing is labeled yet, or the file exists and is not an earlier export.
    """
    if output.exists() and not _is_export(output):
        raise ConfigError(f"--export {output}: the file exists and is not an earlier export. Choose another name")
    rows = list(lines(samples, merge))
    if not rows:
        raise ConfigError(f"{samples} has no labels yet")
    manifest.write_atomically(output, "".join(rows))
    return len(rows), sum(len(set(json.loads(row)["ranks"])) == 1 for row in rows)


def _is_export(file: Path) -> bool:
    with file.open(encoding="utf-8", errors="replace") as content:
        try:
            row = json.loads(content.readline())
            return isinstance(row, dict) and all("ranks" in each for each in row["labels"])
        except (ValueError, KeyError, TypeError):
            return False
