"""A reward for answers of a certain length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from alignkit import Answers, Reward, Run, hookimpl, option


@dataclass(frozen=True)
class Config:
    """The ``reward`` table."""

    words: Annotated[int, Gt(0)] = option(40, "the length with the highest score, in words")


def build(config: Config, run: Run) -> Callable[[Answers], list[float]]:
    """Return the function that scores answers: one number per answer, at most 0."""

    def score(answers: Answers) -> list[float]:
        return [-abs(len(text.split()) - config.words) / config.words for text in answers.texts]

    return score


@hookimpl
def alignkit_reward() -> list[Reward]:
    return [Reward(name="my-thing", summary="answers of a certain length", config=Config, build=build)]
