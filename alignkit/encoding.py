"""From rankings to token ids: what every stage that learns from ranked answers does first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.branches import Branches
from alignkit.chat_template import encode_answer
from alignkit.errors import DataError
from alignkit.rows import Conversation, Ranking

if TYPE_CHECKING:
    from alignkit.data import Located
    from alignkit.run import Run


@dataclass(frozen=True)
class Ranked:
    """A prompt with K >= 2 answers, not all of one rank, as token ids. Each answer holds the token that ends it."""

    prompt: Conversation
    branches: Branches
    ranks: list[float]  # lower is better; equal is a tie
    margins: list[float] | None = None  # how good each answer is on a scale, where the data say

    def pairs(self) -> list[tuple[int, int]]:
        """Every pair of answers that is no tie, as indices, the better first."""
        number = range(len(self.ranks))
        return [(i, j) for i in number for j in number if self.ranks[i] < self.ranks[j]]


def encode_rankings(run: Run, rows: Sequence[Located], max_length: int, too_long: str) -> list[Ranked]:
    """Rankings as token ids. Ties alone make no pair, so such rankings are left out, and counted.

    Raises:
        DataError: an answer and its prompt are longer than ``max_length`` and ``too_long`` is ``error``; nothing is
            left.
    """
    stage = run.config.stage.component.name
    found, over, tied, longest, answers = [], 0, 0, (0, ""), 0
    for where, row in rows:
        assert isinstance(row, Ranking)
        kept: list[tuple[list[int], int, int]] = []
        for index, answer in enumerate(row.answers):
            answers += 1
            try:
                ids, start = encode_answer(run.tokenizer, row.prompt, answer, run.stop_ids)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            if len(ids) > max_length:
                over += 1
                longest = max(longest, (len(ids), where))
            else:
                kept.append((ids, start, index))
        ranks = [row.ranks[index] for *_, index in kept]
        if len(set(ranks)) < 2:
            tied += len(kept) == len(row.answers)
            continue
        trunk = min(start for _, start, _ in kept)
        branches = Branches(kept[0][0][:trunk], [ids[trunk:] for ids, *_ in kept])
        margins = [row.margins[index] for *_, index in kept] if row.margins else None
        found.append(Ranked(row.prompt, branches, ranks, margins))
    if over:
        said = f"{over} of {answers} answers are over {max_length} tokens, the longest {longest[0]} ({longest[1]})"
        if too_long == "error":
            raise DataError(f"{said}. Raise {stage}.max_length, or set {stage}.too_long=skip to leave them out")
        run.say(f"{said}: left out")
    if tied:
        run.say(f"{tied} of {len(rows)} rankings are all ties: left out")
    if not found:
        raise DataError("no ranking is left to train on")
    return found
