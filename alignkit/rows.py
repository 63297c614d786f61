"""Rows of data, independent of the format of the file.

A data format's ``convert`` turns a raw row into one of these five types, or into a type of a plugin. ``Stage.rows`` are
the types that a stage trains on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NotRequired, Protocol, TypeAlias, TypedDict, runtime_checkable

from alignkit.errors import DataError


class Message(TypedDict):
    """One turn of a conversation, as Transformers' chat templates take it."""

    role: str  # "system", "user", "assistant" or "tool"
    content: str  # empty only with tool_calls, or if a tool returned nothing
    tool_calls: NotRequired[list[dict[str, Any]]]  # [{"type": "function", "function": {"name", "arguments": {...}}}]
    tool_call_id: NotRequired[str]  # of a tool turn: the call that it answers
    name: NotRequired[str]  # of the tool or of the speaker
    weight: NotRequired[int]  # of an assistant turn: 1 (the default) is trained on, 0 is context only


Conversation: TypeAlias = list[Message]
Tools: TypeAlias = list[dict[str, Any]]  # JSON schemas of the functions that the model may call


@dataclass(frozen=True)
class Demonstration:
    """A conversation to imitate: the loss is on its assistant turns, except those with weight 0."""

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
        """Rows with the same key stay on one side of the held-out split: everything before the first answer."""
        first = next((i for i, m in enumerate(self.messages) if m["role"] == "assistant"), len(self.messages))
        return _key(self.messages[:first], self.tools)


@dataclass(frozen=True)
class Ranking:
    """K >= 2 answers to a prompt and their ranks: lower is better, equal ranks are ties. A pair has K = 2."""

    prompt: Conversation
    answers: list[str]
    ranks: list[float]
    margins: list[float] | None = None  # a rating of each answer, if known; higher is better
    tools: Tools | None = None

    @property
    def key(self) -> str:
        """Rows with the same key stay on one side of the held-out split: the prompt."""
        return _key(self.prompt, self.tools)


@dataclass(frozen=True)
class Rated:
    """One answer to a prompt, rated as good or bad without comparing it to others."""

    prompt: Conversation
    answer: str
    good: bool
    tools: Tools | None = None

    @property
    def key(self) -> str:
        """Rows with the same key stay on one side of the held-out split: the prompt."""
        return _key(self.prompt, self.tools)


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends before the answer."""

    prompt: Conversation
    tools: Tools | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)  # the other fields of its row, for rewards

    @property
    def key(self) -> str:
        """Rows with the same key stay on one side of the held-out split: the prompt."""
        return _key(self.prompt, self.tools)


@dataclass(frozen=True)
class Text:
    """Plain text; the loss is on all of its tokens."""

    text: str

    @property
    def key(self) -> str:
        """Rows with the same key stay on one side of the held-out split: the text."""
        return self.text


@runtime_checkable
class Row(Protocol):
    """One of the types above, or a plugin's own: a frozen dataclass with a ``key``."""

    @property
    def key(self) -> str:
        """Rows with the same key stay on one side of the held-out split; usually the prompt."""


class Located(NamedTuple):
    """A row and where it comes from, such as ``"prefs.jsonl line 17"``, for messages."""

    where: str
    row: Row


def _key(messages: Conversation, tools: Tools | None) -> str:
    """The texts, one per line, followed by tool calls and tools as JSON."""
    calls = [message["tool_calls"] for message in messages if "tool_calls" in message]
    tool_texts = [json.dumps(value, sort_keys=True) for value in (*calls, tools) if value]
    return "\n".join([*(message["content"] for message in messages), *tool_texts])
