"""Asking a judge: what is stored is not asked again, and a budget limits the requests."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.batches import Question
from alignkit.errors import AlignkitError
from alignkit.judging.choosing import Chosen
from alignkit.judging.comparing import Asking, Outcomes, T, Unasked, Verdict, Way, together, with_fields
from alignkit.judging.samples import Item
from alignkit.judging.store import Store, default_file, key_of

WINDOW = 64  # prompts that are asked about together


class OpenJudge:
    """A judge in memory, and its verdicts so far."""

    def __init__(
        self,
        chosen: Chosen,
        limit: int | None = None,
        batch: int = 16,
        say: Callable[[str], None] = print,
        train: Mapping[str, Any] | None = None,
    ) -> None:
        self.way, self.identity, self.limit = chosen.way, chosen.identity, limit
        self.store = store_of(chosen)
        self.asked = 0  # requests made
        self.stored = 0  # verdicts that an earlier command has stored
        self.without_verdict = 0  # requests to which there was no verdict
        self._verdicts = chosen.open(batch, say, train)

    def ask(self, questions: Sequence[Question], advance: Callable[[int], None]) -> list[Verdict | Unasked]:
        """The verdict on each question. Raises what the judge raises; the verdicts until then are stored."""
        keys = [key_of(self.identity, question) for question in questions]
        known = self.store.read(keys)
        self.stored += len(known)
        advance(sum(key in known for key in keys))
        new = {key: question for key, question in zip(keys, questions, strict=True) if key not in known}
        room = None if self.limit is None else self.limit - self.asked
        todo = dict(itertools.islice(new.items(), room))
        verdicts = self._verdicts(list(todo.values())) if todo else []
        for key, verdict in zip(todo, verdicts, strict=True):
            self.asked += 1
            self.without_verdict += verdict is None
            self.store.write(key, verdict)
            known[key] = verdict
            advance(1)
        return [known.get(key, Unasked()) for key in keys]


def store_of(chosen: Chosen) -> Store:
    """The store of a judge's verdicts: in memory if they have no identity."""
    return Store(None if chosen.identity is None else default_file())


def judge_answers(
    judge: OpenJudge, items: Sequence[Item], advance: Callable[[int], None] = lambda count: None
) -> Iterator[Outcomes | None]:
    """The outcomes of each item, in order; None where the budget of requests was used up.

    ``advance`` is called with the number of requests that are done, of ``sum(judge.way.requests(...))``.

    Raises:
        AlignkitError: from the judge. The verdicts until then are stored, and the message says how many.
    """
    most = [judge.way.requests(item.answers) for item in items]
    start = 0
    while start < len(items):
        stop, done = _window(most, start, judge), 0

        def count(number: int) -> None:
            nonlocal done
            done += number
            advance(number)

        parts = [_compare(judge.way, judge.identity, item) for item in items[start:stop]]
        try:
            outcomes = _drive(together(parts), functools.partial(judge.ask, advance=count))
        except AlignkitError as error:
            if judge.asked and judge.store.file is not None:
                left = sum(most[start:]) - done
                kept = f"{judge.asked} verdicts are stored, up to {left} requests are left"
                error.args = (f"{error}. {kept}: run the command again to continue",)
            raise
        yield from outcomes
        advance(sum(most[start:stop]) - done)  # a sort may need less
        start = stop


def _compare(way: Way, identity: str | None, item: Item) -> Asking[Outcomes | None]:
    """Compare the answers of an item. A judge does not get fields if verdicts are stored: they are not in the key."""
    asking = way.compare(item.prompt, item.answers)
    return with_fields(asking, item.fields) if identity is None else asking


def _window(most: Sequence[int], start: int, judge: OpenJudge) -> int:
    """The end of the window of items that begins at ``start``: those that the budget is sure to suffice for, or one."""
    stop = min(start + WINDOW, len(most))
    if judge.limit is not None:
        room = judge.limit - judge.asked
        while stop > start + 1 and sum(most[start:stop]) > room:
            stop -= 1
    return stop


def _drive(asking: Asking[T], ask: Callable[[list[Question]], list[Verdict | Unasked]]) -> T:
    try:
        questions = next(asking)
        while True:
            questions = asking.send(ask(questions))
    except StopIteration as stop:
        value: T = stop.value
        return value


@dataclass(frozen=True)
class Estimate:
    """The questions that a command would ask."""

    requests: int
    tokens: int | None  # None if the judge does not say
    stored: int  # verdicts that need no request
    exact: bool  # False: at most, because the questions depend on earlier verdicts


def estimate(chosen: Chosen, items: Sequence[Item]) -> Estimate:
    """Count the requests and their tokens. Asks nothing and builds no judge."""
    way, identity, store = chosen.way, chosen.identity, store_of(chosen)
    new: dict[str, Question] = {}
    stored = more = more_tokens = 0
    for item in items:
        if way.sorts(item.answers):
            most = way.requests(item.answers)
            longest = sorted(set(item.answers), key=len)[-2:]
            more += most
            more_tokens += most * (chosen.tokens(Question(item.prompt, tuple(longest))) or 0)
            continue
        questions = next(_compare(way, identity, item), [])
        keys = {key_of(identity, question): question for question in questions}
        known = store.read(keys)
        stored += len(known)
        new |= {key: question for key, question in keys.items() if key not in known}
    counts = [chosen.tokens(question) for question in new.values()]
    tokens = None if chosen.component.tokens is None else sum(count or 0 for count in counts) + more_tokens
    return Estimate(len(new) + more, tokens, stored, not more)
