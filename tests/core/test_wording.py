"""Documentation, help and messages do not fall back into turns of phrase that readers stumbled over."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
WINGS = ("cli", "config", "registry", "reporting", "runs", "bundled")
QUAINT = re.compile(
    r"\b(anew|told|ours|theirs|misfit)\b|\bgo(es|ne|ing)? on (from|with)\b|\bas it has\b|\bwhat came of\b"
    r"|\bwhere (it|that) can be\b|\bnothing of it\b|\bis no (plugin|run|stage|file|name|model)\b",
    re.IGNORECASE,
)


def texts() -> Iterator[tuple[str, str]]:
    """Paragraphs of the pages, and the docstrings, help texts and messages of the wings."""
    for page in PAGES:
        yield from ((page.name, paragraph) for paragraph in page.read_text(encoding="utf-8").split("\n\n"))
    for file in [each for wing in WINGS for each in sorted((ROOT / "alignkit" / wing).glob("*.py"))]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield file.name, node.value


def test_documentation_help_and_messages_are_plain() -> None:
    quaint = {f"{where}: {match[0]}" for where, text in texts() if (match := QUAINT.search(" ".join(text.split())))}

    assert quaint == set()
