"""Special tokens that are spelled out in a row, such as ``<|im_end|>`` in an answer.

They are plain text. If they became tokens, a user could end a turn by typing its end token. Before a conversation is
rendered, each is escaped as two characters that no template changes: :data:`ESCAPE` and a number. When the rendered
text is tokenized, the special tokens that the template wrote become tokens, and the escaped ones become ordinary text.
:data:`ESCAPE` itself is escaped too, so that no text of a row is taken for an escaped token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

ESCAPE = "\ufdd0"  # a noncharacter
FIRST = 0xF0000  # the private-use character that is number 0
MARKUP = ("<think>", "</think>")  # the model writes these itself: they stay tokens even if they are special


@dataclass(frozen=True)
class SpecialToken:
    """A special token of a tokenizer."""

    id: int
    strips_left: bool = False  # it includes the white space before it
    strips_right: bool = False


class SpecialTokens:
    """The special tokens of a tokenizer, by their texts."""

    def __init__(self, tokens: Mapping[str, SpecialToken]) -> None:
        self.tokens = {text: token for text, token in tokens.items() if text}
        self._any = _one_of(self.tokens)
        literal = [ESCAPE, *(text for text in self.tokens if text not in MARKUP)]
        self._literal = _one_of(literal)
        self._escapes = {text: ESCAPE + chr(FIRST + number) for number, text in enumerate(literal)}
        self._texts = {escape: text for text, escape in self._escapes.items()}
        self._escaped = re.compile(f"{ESCAPE}[{chr(FIRST)}-{chr(FIRST + len(literal) - 1)}]")

    def escape(self, value: Any) -> Any:
        """Messages, tools or a text with the special tokens in all texts escaped, except in roles."""
        if isinstance(value, str):
            return self._literal.sub(lambda match: self._escapes[match[0]], value)
        if isinstance(value, list):
            return [self.escape(item) for item in value]
        if isinstance(value, dict):
            return {self.escape(key): item if key == "role" else self.escape(item) for key, item in value.items()}
        return value

    def unescape(self, text: str) -> str:
        """The text with the escaped special tokens spelled out again."""
        return self._escaped.sub(lambda match: self._texts[match[0]], text)

    def is_escaped_in(self, text: str) -> bool:
        """Whether the text has escaped special tokens or characters."""
        return self._escaped.search(text) is not None

    def before_first(self, text: str) -> str:
        """The part of a text before its first special token."""
        return self._any.split(text)[0]

    def ids(self, text: str, plain: Callable[[str], list[int]], behind: Callable[[str], list[int]]) -> list[int]:
        """The token ids of a rendered text; ``plain`` tokenizes a text as if it had no special tokens.

        ``behind`` does the same for a text that follows a special token.
        """
        ids: list[int] = []
        strip = False
        parts = self._any.split(text)
        for number, part in enumerate(parts):
            if number % 2:
                token = self.tokens[part]
                ids.append(token.id)
                strip = token.strips_right
                continue
            after = self.tokens[parts[number + 1]] if number + 1 < len(parts) else None
            part = part.lstrip() if strip else part
            part = part.rstrip() if after and after.strips_left else part
            tokenize = behind if number else plain
            ids += tokenize(self.unescape(part)) if part else []
        return ids


def _one_of(texts: Any) -> re.Pattern[str]:
    either = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
    return re.compile(f"({either})" if either else r"(?!)")
