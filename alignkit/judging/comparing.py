"""The questions that rank K answers, and what their verdicts say about each pair.

Each way is a generator that yields the questions that can be asked at once and is sent their verdicts, so that the
questions of many prompts are asked together. A pair is asked in both orders, and is a tie if the verdicts differ. A
judge whose verdict does not depend on the order is asked in one.

- Up to four answers: every pair.
- More answers, if the judge takes so many at once: one question with all of them and one with the reversed list, which
  shows each pair in both orders.
- More answers to a judge of pairs: a merge sort. It asks about the fewest pairs, 21 of 36 for nine answers, but takes
  the verdicts to be transitive: tied answers are represented by one of them. It begins with an order that is drawn by
  the answers, since their place in it affects the result if verdicts contradict each other.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from alignkit.batches import Question
from alignkit.rows import Conversation

FEW = 4  # so many answers are compared pair by pair

Verdict = Sequence[float] | None
T = TypeVar("T")
Asking = Generator[list[Question], Sequence["Verdict | Unasked"], T]


class Unasked:
    """In place of the verdict on a question that was not asked, because the budget of requests is used up."""


class UnaskedError(Exception):
    """A question was not asked."""


class NoVerdictError(Exception):
    """The judge has no verdict on a question without which the answers cannot be sorted."""


@dataclass(frozen=True)
class Compared:
    """Two answers to a prompt, by index, and the verdicts on them."""

    first: int
    second: int
    margins: tuple[float, ...]  # rank of `second` minus that of `first`: shown in this order, then in the other
    graded: bool = False

    @property
    def verdicts(self) -> tuple[int, ...]:
        """For each order: 1 if ``first`` is better, -1 if ``second`` is, 0 for a tie."""
        return tuple(map(_sign, self.margins))

    @property
    def win(self) -> float:
        """The share of a win that ``first`` gets: 1, 0, or 0.5 for a tie.

        Verdicts that differ between the orders are a tie. A graded judge's margins are added instead.
        """
        if self.graded:
            return (1 + _sign(sum(self.margins))) / 2
        return 0.5 if len(set(self.verdicts)) > 1 else (1 + self.verdicts[0]) / 2


@dataclass(frozen=True)
class Outcomes:
    """A judge's verdicts on K answers to a prompt."""

    wins: list[list[float | None]]  # [K, K] share of a win of the row's answer over the column's; None: no verdict
    compared: list[Compared] = field(default_factory=list)  # the pairs that it was asked about and has judged

    @property
    def complete(self) -> bool:
        """Whether there is a verdict on every pair."""
        return None not in itertools.chain(*self.wins)

    def win_rate(self, answer: int) -> float | None:
        """The share of the other answers that an answer wins against, a tie is half; None without any verdict."""
        wins = [win for other, win in enumerate(self.wins[answer]) if other != answer and win is not None]
        return sum(wins) / len(wins) if wins else None

    @property
    def ranks(self) -> list[int]:
        """The rank of each answer by its wins: 0 is best, equal ranks are a tie. Needs all verdicts."""
        totals = [sum(win or 0 for win in row) for row in self.wins]
        order = sorted(set(totals), reverse=True)
        return [order.index(total) for total in totals]


@dataclass(frozen=True)
class Way:
    """Settings for the questions to a judge."""

    largest: int | None  # answers in one question, None: any number
    order_matters: bool
    graded: bool = False  # see :class:`alignkit.Judge`

    def compare(self, prompt: Conversation, answers: Sequence[str]) -> Asking[Outcomes | None]:
        """Compare answers to a prompt; equal answers tie without being asked about. None: not all was asked."""
        distinct = list(dict.fromkeys(answers))
        try:
            wins, compared = yield from self._distinct(prompt, distinct)
        except UnaskedError:
            return None
        except NoVerdictError:
            wins, compared = [[None] * len(distinct) for _ in distinct], []
        index = {text: number for number, text in enumerate(distinct)}
        of = [index[text] for text in answers]
        every = [[0.5 if a == b else wins[a][b] for b in of] for a in of]
        first = {number: answers.index(text) for text, number in index.items()}
        shown = [dataclasses.replace(each, first=first[each.first], second=first[each.second]) for each in compared]
        return Outcomes(every, shown)

    def requests(self, answers: Sequence[str]) -> int:
        """The number of questions that :meth:`compare` asks, or their maximum if it sorts."""
        count, orders = len(set(answers)), 2 if self.order_matters else 1
        if count < 2:
            return 0
        if self._at_once(count):
            return orders
        return orders * (_most_comparisons(count) if self.sorts(answers) else count * (count - 1) // 2)

    def sorts(self, answers: Sequence[str]) -> bool:
        """Whether the questions depend on earlier verdicts."""
        count = len(set(answers))
        return count > FEW and not self._at_once(count)

    def _at_once(self, count: int) -> bool:
        enough = self.largest is None or count <= self.largest
        return enough and count > 1 and (count > FEW or not self.order_matters)

    def _distinct(
        self, prompt: Conversation, answers: list[str]
    ) -> Asking[tuple[list[list[float | None]], list[Compared]]]:
        everyone = range(len(answers))
        if self.sorts(answers):
            shuffled = random.Random(json.dumps([prompt, answers])).sample(everyone, len(answers))
            groups, compared = yield from self._sort(prompt, answers, shuffled)
            place = {answer: number for number, group in enumerate(groups) for answer in group}
            return [[(1 + _sign(place[b] - place[a])) / 2 for b in everyone] for a in everyone], compared
        pairs = list(itertools.combinations(everyone, 2))
        if self._at_once(len(answers)):
            found = yield from self._all_at_once(prompt, answers, pairs)
        else:
            found = yield from self._pairs(prompt, answers, pairs)
        wins: list[list[float | None]] = [[None] * len(answers) for _ in answers]
        for compared_pair in found:
            wins[compared_pair.first][compared_pair.second] = compared_pair.win
            wins[compared_pair.second][compared_pair.first] = 1 - compared_pair.win
        return wins, found

    def _pairs(
        self, prompt: Conversation, answers: Sequence[str], pairs: Sequence[tuple[int, int]]
    ) -> Asking[list[Compared]]:
        """Ask about each pair. Those without a verdict in each order are left out."""
        orders = 2 if self.order_matters else 1
        questions = [
            Question(prompt, order)
            for a, b in pairs
            for order in ((answers[a], answers[b]), (answers[b], answers[a]))[:orders]
        ]
        verdicts = iter((yield from _ask(questions)))
        compared = []
        for a, b in pairs:
            shown = zip((1, -1), itertools.islice(verdicts, orders), strict=False)
            margins = [sign * (verdict[1] - verdict[0]) for sign, verdict in shown if verdict is not None]
            if len(margins) == orders:
                compared.append(Compared(a, b, tuple(margins), self.graded))
        return compared

    def _all_at_once(
        self, prompt: Conversation, answers: Sequence[str], pairs: Sequence[tuple[int, int]]
    ) -> Asking[list[Compared]]:
        """Ask about all answers, and about the reversed list. There are no pairs if one has no verdict."""
        questions = [Question(prompt, tuple(answers)), Question(prompt, tuple(reversed(answers)))]
        verdicts = yield from _ask(questions if self.order_matters else questions[:1])
        if None in verdicts:
            return []
        ranks = [verdict if number == 0 else verdict[::-1] for number, verdict in enumerate(verdicts) if verdict]
        return [Compared(a, b, tuple(rank[b] - rank[a] for rank in ranks), self.graded) for a, b in pairs]

    def _sort(
        self, prompt: Conversation, answers: Sequence[str], some: Sequence[int]
    ) -> Asking[tuple[list[list[int]], list[Compared]]]:
        """Merge sort: the answers as groups of ties, best first, and the pairs that were compared."""
        if len(some) == 1:
            return [list(some)], []
        middle = len(some) // 2
        halves = [self._sort(prompt, answers, half) for half in (some[:middle], some[middle:])]
        (left, in_left), (right, in_right) = yield from together(halves)
        merged, compared = list[list[int]](), [*in_left, *in_right]
        while left and right:
            pair = yield from self._pairs(prompt, answers, [(left[0][0], right[0][0])])
            if not pair:
                raise NoVerdictError
            compared += pair
            win = pair[0].win
            if win == 0.5:
                merged.append([*left.pop(0), *right.pop(0)])
            else:
                merged.append((left if win == 1 else right).pop(0))
        return [*merged, *left, *right], compared


def together(parts: Sequence[Asking[T]]) -> Asking[list[T]]:
    """Run several askings in step: the questions of all of them are yielded as one list."""
    results, questions = dict[int, T](), dict[int, list[Question]]()

    def go_on(number: int, verdicts: Sequence[Verdict | Unasked] | None) -> None:
        try:
            questions[number] = parts[number].send(verdicts)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as stop:
            questions.pop(number, None)
            results[number] = stop.value

    for number in range(len(parts)):
        go_on(number, None)
    while questions:
        verdicts = iter((yield list(itertools.chain(*questions.values()))))
        for number, own in list(questions.items()):
            go_on(number, list(itertools.islice(verdicts, len(own))))
    return [results[number] for number in range(len(parts))]


def with_fields(asking: Asking[T], fields: Mapping[str, Any] | None) -> Asking[T]:
    """An asking whose questions have the fields of a row."""
    verdicts = None
    while True:
        try:
            questions = asking.send(verdicts)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as stop:
            result: T = stop.value
            return result
        verdicts = yield [dataclasses.replace(question, fields=fields) for question in questions]


def _ask(questions: list[Question]) -> Asking[list[Verdict]]:
    verdicts = yield questions
    if any(isinstance(verdict, Unasked) for verdict in verdicts):
        raise UnaskedError
    return [verdict for verdict in verdicts if not isinstance(verdict, Unasked)]


def _sign(difference: float) -> int:
    return (difference > 0) - (difference < 0)


def _most_comparisons(count: int) -> int:
    """The comparisons that a merge sort makes at most."""
    if count < 2:
        return 0
    return _most_comparisons(count // 2) + _most_comparisons(count - count // 2) + count - 1
