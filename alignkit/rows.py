"""What a row of data means, whatever format it was written in.

A data format's ``convert`` turns one raw row into one of these four, or into a kind that a plugin brings; a stage says
which of them it trains on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypedDict, runtime_checkable

from alignkit.errors import DataError


class Message(TypedDict):
    """One turn of a conversation."""

    role: str  # "system", "user" or "assistant"
    content: str


Conversation: TypeAlias = list[Message]


@dataclass(frozen=True)
class Demonstration:
    """A conversation to imitate: the loss falls on its assistant turns."""

    messages: Conversation

    def __post_init__(self) -> None:
        if not any(message["role"] == "assistant" for message in self.messages):
            raise DataError("a demonstration needs an assistant turn")

    @property
    def key(self) -> str:
        """What the held-out split keeps together: everything before the first answer."""
        first = next((i for i, m in enumerate(self.messages) if m["role"] == "assistant"), len(self.messages))
        return _text(self.messages[:first])


@dataclass(frozen=True)
class Ranking:
    """K >= 2 answers to one prompt, with a rank for each: lower is better, equal is a tie. A pair has K = 2."""

    prompt: Conversation
    answers: list[str]
    ranks: list[float]
    margins: list[float] | None = None  # how good each answer is on a scale, where that is known; higher is better

    @property
    def key(self) -> str:
        """What the held-out split keeps together: the prompt."""
        return _text(self.prompt)


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer."""

    prompt: Conversation

    @property
    def key(self) -> str:
        """What the held-out split keeps together: the prompt."""
        return _text(self.prompt)


@dataclass(frozen=True)
class Text:
    """Plain text to model from its first token to its last."""

    text: str

    @property
    def key(self) -> str:
        """What the held-out split keeps together: the text."""
        return self.text


@runtime_checkable
class Row(Protocol):
    """Any of the above, or a plugin's own: a frozen dataclass with a ``key``. A format makes it, a stage takes it."""

    @property
    def key(self) -> str:
        """What the held-out split keeps together: as a rule the prompt."""


def _text(messages: Conversation) -> str:
    return "\n".join(m["content"] for m in messages)
