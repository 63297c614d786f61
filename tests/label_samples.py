"""Samples to rank in the tests of the labeling page."""

from __future__ import annotations

import json
import random
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
