"""What a row of data means, whatever format it was written in.

A data format's ``convert`` turns one raw row into one of these four, or into a kind that a plugin brings; a stage says
which of them it trains on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple, NotRequired, Protocol, TypeAlias, TypedDict, runtime_checkable

from alignkit.errors import DataError


class Message(TypedDict):
    """One turn of a conversation, as Transformers' chat templates take it."""

    role: str  # "system", "user", "assistant" or "tool"
    content: str  # empty only beside tool_calls, or where a tool returned nothing
    tool_calls: NotRequired[list[dict[str, Any]]]  # [{"type": "function", "function": {"name", "arguments": {...}}}]
    tool_call_id: NotRequired[str]  # of a tool's turn: the call that it answers
    name: NotRequired[str]  # of the tool, or of who speaks
    weight: NotRequired[int]  # of an assistant's turn: 1 (or absent) learnt, 0 context only


Conversation: TypeAlias = list[Message]
Tools: TypeAlias = list[dict[str, Any]]  # JSON schemas of the functions that the model may call


@dataclass(frozen=True)
class Demonstration:
    """A conversation to imitate: the loss falls on its assistant turns, except those of weight 0."""

    messages: Conversation
    tools: Tools | None = None

    def __post_init__(self) -> None:
        weights = [message.get("weight", 1) for message in self.messages if message["role"] == "assistant"]
        if not weights:
            raise DataError("a demonstration needs an assistant turn")
        if not any(weights):
            raise DataError("every assistant turn has weight 0, so there is nothing to learn")

    @property
    def key(self) -> str:
        """What the held-out split keeps together: everything before the first answer."""
        first = next((i for i, m in enumerate(self.messages) if m["role"] == "assistant"), len(self.messages))
        return _key(self.messages[:first], self.tools)


@dataclass(frozen=True)
class Ranking:
    """K >= 2 answers to one prompt, with a rank for each: lower is better, equal is a tie. A pair has K = 2."""

    prompt: Conversation
    answers: list[str]
    ranks: list[float]
    margins: list[float] | None = None  # how good each answer is on a scale, where that is known; higher is better
    tools: Tools | None = None

    @property
    def key(self) -> str:
        """What the held-out split keeps together: the prompt."""
        return _key(self.prompt, self.tools)


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer."""

    prompt: Conversation
    tools: Tools | None = None

    @property
    def key(self) -> str:
        """What the held-out split keeps together: the prompt."""
        return _key(self.prompt, self.tools)


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


class Located(NamedTuple):
    """A row and where it is from, for messages: ``"prefs.jsonl line 17"``."""

    where: str
    row: Row


def _key(messages: Conversation, tools: Tools | None) -> str:
    """The texts, a line each; what a conversation has beside them follows as JSON."""
    calls = [message["tool_calls"] for message in messages if "tool_calls" in message]
    beside = [json.dumps(each, sort_keys=True) for each in (*calls, tools) if each]
    return "\n".join([*(message["content"] for message in messages), *beside])
