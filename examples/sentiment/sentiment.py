"""A reward function: how glad an answer sounds to VADER (Hutto and Gilbert 2014), a lexicon with rules."""

import functools
from typing import Any


@functools.cache
def analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def score(prompts: list[str], answers: list[str]) -> list[float]:
    """From -1, as sad as can be, to 1."""
    return [analyzer().polarity_scores(answer)["compound"] for answer in answers]
