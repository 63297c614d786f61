"""The labeling guide (GUIDE.md) as a function. It judges the form of an answer only.

Whether an answer is true or helpful has to be judged by a person or a model.
"""

from __future__ import annotations

import re
from collections import Counter

_WORD = re.compile(r"[A-Za-z0-9'’]+")
_OPENERS = re.compile(
    r"(sure|certainly|of course|absolutely|great|good question|what a|thank|hello|hi|hey|here (is|are)|here's|"
    r"as an ai|i am an ai|i'm an ai|i'm sorry|i apologi[sz]e|i'd be happy|i'm happy|i can help|let me)\b",
    re.IGNORECASE,
)
_STOCK = re.compile(
    r"^(good luck|enjoy|have fun|have a (great|nice|good|lovely) day)!$|"
    r"hope this|happy to help|let me know|feel free|glad to|you're welcome|any questions",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"\*|`|#|https?:|www\.|^\s*(-|\d+\.)\s|[\U0001F300-\U0001FAFF]|\[.*?\]", re.MULTILINE)
_COMMON = frozenset(
    re.findall(
        r"\w+",
        """a an the and or but if is are was do does did can could will would should i you me my your we it its this
        that what which who how why when where of in on at to for from with about as by be have not no any please""",
    )
)


def score(prompts: list[str], answers: list[str]) -> list[float]:
    """Score each answer by rules 1 to 5 of the guide: 0 to 7 points, or -1 for a text that is not an answer."""
    return [_score(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def _score(prompt: str, answer: str) -> float:
    if not _answers(prompt, answer):
        return -1.0
    sentences = [s for s in re.split(r"(?<=[.!?])[\"'”)]*\s+", answer.strip()) if s]
    words = len(answer.split())
    closing = sentences[-1]
    return float(
        _is_direct(prompt, sentences[0])
        + (3 <= len(sentences) <= 4)
        + (20 <= words <= 60)
        + ("\n" not in answer.strip())
        + (not _MARKUP.search(answer))
        + bool(re.search(r"[.!?][\"'”)]*$", answer.strip()))
        + (2 <= len(closing.split()) <= 8 and closing.endswith("!") and not _STOCK.search(closing))
    )


def _answers(prompt: str, answer: str) -> bool:
    """Whether the text is an answer: at least three words, not all from the question, and no endless repetition."""
    words = [word.lower() for word in _WORD.findall(answer)]
    if len(words) < 3 or set(words) <= {word.lower() for word in _WORD.findall(prompt)}:
        return False
    triples = Counter(zip(words, words[1:], words[2:], strict=False))
    return max(triples.values()) < 4


def _is_direct(prompt: str, first: str) -> bool:
    """Whether the first sentence has no stock opening and does not repeat the question."""
    if _OPENERS.match(first.lstrip("\"'“ ")):
        return False
    asked = {word.lower() for word in _WORD.findall(prompt)} - _COMMON
    answered = {word.lower() for word in _WORD.findall(first)} - _COMMON
    return not (first.endswith("?") and len(asked & answered) > len(asked) / 2)
