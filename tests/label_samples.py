"""Samples to rank in the tests of the labeling page."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".jsonl")  # as a model could have answered; for the screenshots
REALISTIC = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def essay(words: int, seed: int) -> str:
    """Prose of that many words, in paragraphs."""
    vocabulary = " ".join(answer for row in REALISTIC for answer in row["responses"]).lower().split()
    generator = random.Random(seed)
    paragraphs = []
    while words > 0:
        length = min(words, generator.randint(60, 140))
        paragraphs.append(" ".join(generator.choices(vocabulary, k=length)).capitalize() + ".")
        words -= length
    return "\n\n".join(paragraphs)


def numbered(count: int, k: int = 3) -> list[dict[str, Any]]:
    """Rows whose answers name themselves: "item 4, answer 2"."""
    return [
        {"prompt": f"Question {item}?", "responses": [f"item {item}, answer {answer}" for answer in range(k)]}
        for item in range(count)
    ]


def rank_of(text: str) -> int:
    """A rank from 1 for "item 4, answer 2": every third item has a tie, and the ranks of every fourth a gap."""
    item, answer = map(int, re.findall(r"\d+", text))
    rank = (item + answer) % 3 + 1
    if item % 3 == 0:
        rank = min(rank, 2)
    return rank if item % 4 else {1: 1, 2: 3, 3: 3}[rank]


def dense(ranks: list[int]) -> list[int]:
    """Ranks as they are exported: from 0, without gaps."""
    return [sorted(set(ranks)).index(rank) for rank in ranks]
