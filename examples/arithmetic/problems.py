"""Write small arithmetic problems and their answers, one row each: ``python problems.py problems.jsonl``."""

import json
import random
import sys
from pathlib import Path


def problems(number: int, seed: int = 0) -> list[dict[str, str]]:
    """``number`` different problems: comparisons of two-digit numbers, and sums and products of one-digit numbers."""
    rng = random.Random(seed)
    rows: dict[str, str] = {}  # prompt -> answer
    while len(rows) < number:
        (a, b), (c, d) = (rng.sample(range(10, 100), 2), rng.choices(range(2, 10), k=2))
        question, answer = rng.choice(
            [
                (f"Which number is larger, {a} or {b}?", max(a, b)),
                (f"Which number is smaller, {a} or {b}?", min(a, b)),
                (f"What is {c} + {d}?", c + d),
                (f"What is {c} times {d}?", c * d),
            ]
        )
        rows[f"{question} Answer with the number alone."] = str(answer)
    return [{"prompt": prompt, "answer": answer} for prompt, answer in rows.items()]


if __name__ == "__main__":
    rows = problems(400)
    Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
