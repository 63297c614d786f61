"""MkDocs hook: pages without sections, such as source, take the width of the table of contents."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> None:
    if not re.search("^(##|:::) ", markdown, re.M):
        page.meta["hide"] = ["toc"]
