"""Write the texts of this example, from text that is on every machine: ``python texts.py``.

``texts.jsonl`` holds paragraphs of the Python reference, for PPO-ptx. ``reference.jsonl`` holds other paragraphs of it,
and ``docs.jsonl`` paragraphs of alignkit's documentation: text to measure perplexity on. ``choices.jsonl`` holds the
beginnings of paragraphs of both, each with four endings of which one is right, for lm-eval.
"""

import json
import random
import re
from pathlib import Path
from pydoc_data.topics import topics

DOCS = Path(__file__).parents[2] / "docs"
HELD_OUT = 80  # paragraphs of each source


def paragraphs(text: str) -> list[str]:
    """The paragraphs that are prose of 200 to 700 characters."""
    joined = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [
        p for p in joined if 200 <= len(p) <= 700 and re.match("[A-Z].*[.]$", p) and not re.search(r"::|>>>|[|]", p)
    ]


def write(file: str, rows: list[dict[str, object]]) -> None:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{file}: {len(rows)} rows")


def choices(texts: list[str], draw: random.Random) -> list[dict[str, object]]:
    """The first half of each text, with its own second half among those of three others."""
    halves = [
        (" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])) for words in map(str.split, texts)
    ]
    rows = []
    for beginning, end in halves:
        others = draw.sample([other for _, other in halves if other != end], 3)
        endings = draw.sample([end, *others], 4)
        rows.append({"beginning": beginning, "endings": endings, "right": endings.index(end)})
    return rows


def main() -> None:
    draw = random.Random(0)
    reference = sorted({p for name in topics for p in paragraphs(topics[name])})
    docs = sorted({p for page in DOCS.glob("*.md") for p in paragraphs(page.read_text(encoding="utf-8"))})
    draw.shuffle(reference)
    draw.shuffle(docs)
    held_out, docs = reference[:HELD_OUT], docs[:HELD_OUT]
    write("texts.jsonl", [{"text": text} for text in reference[HELD_OUT:]])
    write("reference.jsonl", [{"text": text} for text in held_out])
    write("docs.jsonl", [{"text": text} for text in docs])
    questions = choices(held_out, draw) + choices(docs, draw)
    write("choices.jsonl", draw.sample(questions, len(questions)))  # in random order, for --limit


if __name__ == "__main__":
    main()
