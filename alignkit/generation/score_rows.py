"""Scores rows of answers with a reward model. Importing this module imports no torch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from alignkit.config import DataConfig
from alignkit.data.reading import read
from alignkit.errors import DataError
from alignkit.generation import rankings
from alignkit.registry import Registry
from alignkit.rows import Demonstration, Located, Ranking, Tools
from alignkit.runs.lineage import Parent

WINDOW = 256  # rows in memory at a time


def read_answers(path: str, data_format: str | None) -> Iterator[Located]:
    """The rows at ``path``, each with a prompt and one or more answers.

    Raises:
        DataError: there are none, or a row is bad.
    """
    rows = read(Registry(), DataConfig(format=data_format), path, (Demonstration, Ranking))
    first = next(rows, None)
    if first is None:
        raise DataError(f"{path} has no rows to score")
    return itertools.chain([first], rows)


def scored(
    run: Parent, rows: Iterator[Located], batch: int, advance: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    """The rows with their scores, as ``alignkit score`` writes them. ``run`` is that of the reward model.

    Raises:
        DataError: a score is not a finite number.
    """
    from alignkit.generation.scoring import RewardModel

    assert run.manifest is not None
    scorer = RewardModel(run.folder, run.manifest)
    while window := list(itertools.islice(rows, WINDOW)):
        texts = [_answers(row) for row in window]
        encoded = [
            scorer.encode(prompt, answer, tools)
            for (prompt, answers), tools in zip(texts, map(_tools, window), strict=True)
            for answer in answers
        ]
        every = [answer for _, answers in texts for answer in answers]
        scored_by = functools.partial(scorer.scores, encoded, batch)
        scores = iter(rankings.checked(f"the reward model in {run.folder}", scored_by, every))
        for (prompt, answers), (_, row) in zip(texts, window, strict=True):
            own = [round(next(scores), 6) for _ in answers]
            if isinstance(row, Ranking):
                yield {"prompt": prompt, "responses": answers, "ranks": row.ranks, "scores": own}
            else:
                yield {"prompt": prompt, "response": answers[0], "score": own[0]}
        advance(len(window))


def _tools(located: Located) -> Tools | None:
    assert isinstance(located.row, Ranking | Demonstration)
    return located.row.tools


def _answers(located: Located) -> tuple[Any, list[str]]:
    row = located.row
    if isinstance(row, Ranking):
        return row.prompt, row.answers
    assert isinstance(row, Demonstration)
    if row.messages[-1]["role"] != "assistant":
        raise DataError(f"{located.where}: the last message must be from the assistant")
    if row.messages[-1].get("tool_calls"):
        raise DataError(f"{located.where}: the answer has tool_calls, and only answers in text can be scored")
    return row.messages[:-1], [row.messages[-1]["content"]]
