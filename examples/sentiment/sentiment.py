"""A reward function: how positive an answer is according to VADER (Hutto and Gilbert 2014), a lexicon with rules."""

import functools
from typing import Any


@functools.cache
def analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def score(prompts: list[str], answers: list[str]) -> list[float]:
    """One score per answer, from -1 (negative) to 1 (positive)."""
    return [analyzer().polarity_scores(answer)["compound"] for answer in answers]
