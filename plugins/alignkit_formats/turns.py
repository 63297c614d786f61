"""The turns of a conversation: roles, texts, tool calls and weights, checked. Raises DataError that says which turn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from alignkit import Conversation, DataError, Message

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "developer": "system",  # OpenAI's newer name of it
}
# Parts of a turn that would be lost, and what to do about each.
UNREADABLE = {
    "function_call": "write it as tool_calls",
    "reasoning_content": "write the thought into the content, as the model writes it",
    "thinking": "write the thought into the content, as the model writes it",
    "refusal": "write it as the content",
    "audio": "only text can be trained on",
}


def conversation(turns: Any, field: str, role: str = "role", content: str = "content") -> Conversation:
    """A list of turns under the names that this format has for ``role`` and ``content``."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f"'{field}' must be a list of {{{role}, {content}}}")
    return [_turn(turn, field, number, role, content) for number, turn in enumerate(turns, 1)]


def _turn(turn: Mapping[str, Any], field: str, number: int, role_field: str, content_field: str) -> Message:
    where, part = f"'{field}' turn {number}", f"{field} turn {number}"
    written = turn.get(role_field)
    if not isinstance(written, str) or written not in ROLES:
        raise DataError(f"{where} has {role_field} {written!r}; known: {', '.join(ROLES)}")
    role = ROLES[written]
    for key, advice in UNREADABLE.items():
        if turn.get(key):
            raise DataError(f"{where} has '{key}': {advice}")
    calls = _tool_calls(turn.get("tool_calls"), part)
    if calls and role != "assistant":
        raise DataError(f"{where} has tool_calls, but is not the assistant's")
    content = _joined(turn.get(content_field), f"{part} {content_field}")
    if content in (None, "") and (calls or role == "tool"):  # a call may stand alone, and a tool may return nothing
        made = Message(role=role, content="")
    else:
        made = message(role, content, f"{part} {content_field}")
    if calls:
        made["tool_calls"] = calls
    if turn.get("name") is not None:
        made["name"] = text(turn["name"], f"{part} name")
    if turn.get("tool_call_id") is not None:
        made["tool_call_id"] = text(turn["tool_call_id"], f"{part} tool_call_id")
    weight = _weight(turn, where)
    if role == "assistant" and weight is not None:
        made["weight"] = weight
    elif weight:
        raise DataError(f"{where} has weight 1, but only the assistant's turns are learnt")
    return made


def message(role: str, content: Any, field: str) -> Message:
    """A turn that says something."""
    return Message(role=role, content=text(content, field))


def text(value: Any, field: str) -> str:
    """A text that is not empty."""
    if value is None:
        raise DataError(f"'{field}' is missing")
    if not isinstance(value, str):
        raise DataError(f"'{field}' must be text, not {type(value).__name__}")
    if not value.strip():
        raise DataError(f"'{field}' is empty")
    return value


def tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The schemas under ``tools``: a list, or, as columns of one type need it, its JSON text."""
    if row.get("functions"):
        raise DataError("'functions' is OpenAI's former way to declare tools: write them as 'tools'")
    value = row.get("tools")
    if isinstance(value, str):
        value = _loads(value, "tools") if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError("'tools' must be a list of JSON schemas")
    return value


def _joined(content: Any, field: str) -> Any:
    """OpenAI's ``[{"type": "text", "text": ...}, ...]`` as one text; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(f"'{field}' has a part of type {kind!r}; only text can be trained on")
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls as chat templates take them, with arguments as an object; OpenAI writes those as JSON text."""
    if calls is None:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise DataError(f"'{where} tool_calls' must be a list of calls")
    made = []
    for call in calls:
        function = call.get("function", call)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise DataError(f"'{where} tool_calls' has a call without the name of a function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _loads(arguments or "{}", f"{where} tool_calls arguments")
        if not isinstance(arguments, Mapping | None):
            raise DataError(f"'{where} tool_calls arguments' of {name} must be an object")
        beside = {"id": call["id"]} if call.get("id") is not None else {}
        made.append({**beside, "type": "function", "function": {"name": name, "arguments": dict(arguments or {})}})
    return made


def _weight(turn: Mapping[str, Any], where: str) -> int | None:
    """OpenAI's ``weight`` (0 or 1), or ``train`` (true or false) as other tools write it; None where neither is."""
    for key, known in (("weight", (0, 1)), ("train", (False, True))):
        value = turn.get(key)
        if value is not None:
            if not isinstance(value, int | float) or value not in known:
                raise DataError(f"{where} has {key} {value!r}; known: {', '.join(map(json.dumps, known))}")
            return int(value)
    return None


def _loads(value: str, field: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{field}' is not valid JSON: {error}") from None
