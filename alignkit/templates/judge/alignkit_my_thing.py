"""A judge that prefers shorter answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from alignkit import Judge, Question, Run, hookimpl, option


@dataclass(frozen=True)
class Config:
    """The ``judge`` table."""

    step: Annotated[int, Gt(0)] = option(10, "answers whose lengths differ by less, in words, may be a tie")


def build(config: Config, run: Run) -> Callable[[Sequence[Question]], Iterator[list[float]]]:
    """Return the function that ranks the answers of each question: lower is better, equal ranks are a tie."""

    def judge(questions: Sequence[Question]) -> Iterator[list[float]]:
        for question in questions:
            yield [len(answer.split()) // config.step for answer in question.answers]

    return judge


@hookimpl
def alignkit_judge() -> list[Judge]:
    return [
        Judge(
            name="my-thing",
            summary="shorter answers are better",
            config=Config,
            build=build,
            largest=lambda config: None,  # it takes any number of answers at once
            order_matters=False,  # and their order does not matter
            identity=lambda config: None,  # asking costs nothing, so verdicts are not stored
        )
    ]
