"""The prompt of a row, and its text."""

from __future__ import annotations

from typing import cast

from alignkit.rows import Conversation, Demonstration, Message, Row


def prompt_of(row: Row) -> Conversation:
    """The prompt of a row, of a plugin's own type too: its attribute ``prompt``.

    In a demonstration, it is all that precedes the last answer, without the turns' weights.
    """
    if isinstance(row, Demonstration):
        last = max(turn for turn, message in enumerate(row.messages) if message["role"] == "assistant")
        return [cast(Message, {k: v for k, v in turn.items() if k != "weight"}) for turn in row.messages[:last]]
    prompt: Conversation = row.prompt  # type: ignore[attr-defined]
    return prompt


def has_prompt(row: Row) -> bool:
    """Whether a row has a prompt, which a text has not."""
    return isinstance(row, Demonstration) or hasattr(row, "prompt")


def prompt_text(prompt: str | Conversation) -> str:
    """A prompt as a function of texts gets it: the text, or the last user turn of a conversation."""
    if isinstance(prompt, str):
        return prompt
    return next((message["content"] for message in reversed(prompt) if message["role"] == "user"), "")


def has_tools(row: Row) -> bool:
    """Whether a row names functions that the model may call."""
    return bool(getattr(row, "tools", None))
