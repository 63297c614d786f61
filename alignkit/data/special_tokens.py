"""Special tokens that are written out in someone's text, such as ``<|im_end|>`` in an answer.

They are text: a tokenizer that takes them for the token would let a user end a turn, or a labeler an answer. Before a
conversation is rendered they are set apart as private-use characters, which no template touches. When the rendered text
is tokenised, the special tokens of the template become tokens and those of the text become letters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

FIRST = 0xF0000  # the first of the private-use characters
MARKUP = ("<think>", "</think>")  # what an assistant writes itself; tokens even where they are special


@dataclass(frozen=True)
class Special:
    """A special token of a tokenizer."""

    id: int
    strips_left: bool = False  # takes the white space before it
    strips_right: bool = False


class SetApart:
    """The special tokens of a tokenizer by their texts."""

    def __init__(self, special: Mapping[str, Special]) -> None:
        self.special = {text: token for text, token in special.items() if text}
        self.literal = [text for text in self.special if text not in MARKUP]
        self._any = _one_of(self.special)
        self._literal = _one_of(self.literal)
        self._hidden = re.compile(f"[{chr(FIRST)}-{chr(FIRST + len(self.literal) - 1)}]" if self.literal else r"(?!)")

    def hide(self, value: Any) -> Any:
        """Messages, tools or a text with the special tokens in every text set apart, but not in the roles."""
        if isinstance(value, str):
            return self._literal.sub(lambda found: chr(FIRST + self.literal.index(found[0])), value)
        if isinstance(value, list):
            return [self.hide(one) for one in value]
        if isinstance(value, dict):
            return {key: one if key == "role" else self.hide(one) for key, one in value.items()}
        return value

    def back(self, text: str) -> str:
        """The text with what was set apart written out again."""
        last = FIRST + len(self.literal)
        return "".join(self.literal[ord(c) - FIRST] if FIRST <= ord(c) < last else c for c in text)

    def is_in(self, text: str) -> bool:
        """Whether something in it was set apart."""
        return self._hidden.search(text) is not None

    def plain_start(self, text: str) -> str:
        """A text up to its first special token."""
        return self._any.split(text)[0]

    def ids(self, text: str, plain: Callable[[str], list[int]]) -> list[int]:
        """Token ids of a rendered text; ``plain`` tokenises a text without a look at special tokens."""
        found: list[int] = []
        strip = False
        parts = self._any.split(text)
        for number, part in enumerate(parts):
            if number % 2:
                token = self.special[part]
                found.append(token.id)
                strip = token.strips_right
                continue
            after = self.special[parts[number + 1]] if number + 1 < len(parts) else None
            part = part.lstrip() if strip else part
            part = part.rstrip() if after and after.strips_left else part
            found += plain(self.back(part)) if part else []
        return found


def _one_of(texts: Any) -> re.Pattern[str]:
    either = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
    return re.compile(f"({either})" if either else r"(?!)")
