"""Markdown as safe HTML: the text of a model cannot run code or load anything from elsewhere."""

from __future__ import annotations

import functools
from typing import Any

TAGS = {
    *("p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "pre", "code", "em", "strong", "s", "a"),
    *("ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td"),
}


def render(text: str) -> str:
    """Convert Markdown to HTML with a fixed set of tags. Raw HTML stays text, and images become links."""
    import nh3

    return nh3.clean(
        _parser().render(text),
        tags=TAGS,
        attributes={"a": {"href"}, "ol": {"start"}},
        url_schemes={"http", "https", "mailto"},
        set_tag_attribute_values={"a": {"target": "_blank"}},
        link_rel="noopener noreferrer nofollow",
    )


@functools.cache
def _parser() -> Any:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable("image")
