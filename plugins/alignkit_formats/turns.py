"""The turns of a conversation: roles, texts, tool calls and weights. A DataError names the turn that is wrong."""

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
    "developer": "system",  # OpenAI's newer name
}
# fields of a turn that have no place in a message, and what to do about each
UNSUPPORTED = {
    "function_call": "write it as tool_calls",
    "reasoning_content": "write the reasoning into the content, as the model does",
    "thinking": "write the reasoning into the content, as the model does",
    "refusal": "write it as the content",
    "audio": "only text is supported",
}


def conversation(turns: Any, field: str, role: str = "role", content: str = "content") -> Conversation:
    """A list of turns. ``role`` and ``content`` are the names of these fields in the data."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f"'{field}' must be a list of {{{role}, {content}}}")
    return [_turn(turn, field, number, role, content) for number, turn in enumerate(turns, 1)]


def _turn(turn: Mapping[str, Any], field: str, number: int, role_field: str, content_field: str) -> Message:
    where, part = f"'{field}' turn {number}", f"{field} turn {number}"
    name = turn.get(role_field)
    if not isinstance(name, str) or name not in ROLES:
        raise DataError(f"{where} has {role_field} {name!r}; known: {', '.join(ROLES)}")
    role = ROLES[name]
    for key, advice in UNSUPPORTED.items():
        if turn.get(key):
            raise DataError(f"{where} has '{key}': {advice}")
    calls = _tool_calls(turn.get("tool_calls"), part)
    if calls and role != "assistant":
        raise DataError(f"{where} has tool_calls, but is not the assistant's")
    content = _joined(turn.get(content_field), f"{part} {content_field}")
    if content in (None, "") and (calls or role == "tool"):  # a call needs no text, and a tool may return nothing
        parsed = Message(role=role, content="")
    else:
        parsed = message(role, content, f"{part} {content_field}")
    if calls:
        parsed["tool_calls"] = calls
    if turn.get("name") is not None:
        parsed["name"] = text(turn["name"], f"{part} name")
    if turn.get("tool_call_id") is not None:
        parsed["tool_call_id"] = text(turn["tool_call_id"], f"{part} tool_call_id")
    weight = _weight(turn, where)
    if role == "assistant" and weight is not None:
        parsed["weight"] = weight
    elif weight:
        raise DataError(f"{where} has weight 1, but only the assistant's turns are trained on")
    return parsed


def message(role: str, content: Any, field: str) -> Message:
    """A turn whose text is not empty."""
    return Message(role=role, content=text(content, field))


def text(value: Any, field: str) -> str:
    """A text, which must not be empty."""
    if value is None:
        raise DataError(f"'{field}' is missing")
    if not isinstance(value, str):
        raise DataError(f"'{field}' must be text, not {type(value).__name__}")
    if not value.strip():
        raise DataError(f"'{field}' is empty")
    return value


def tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The schemas under ``tools``: a list, or its JSON text, as columnar data sets store it."""
    if row.get("functions"):
        raise DataError("'functions' is OpenAI's old field for tools: write them as 'tools'")
    value = row.get("tools")
    if isinstance(value, str):
        value = _loads(value, "tools") if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError("'tools' must be a list of JSON schemas")
    return value


def history(row: Mapping[str, Any]) -> Conversation:
    """LLaMA-Factory's earlier turns under ``history``: a list of [user, assistant], or its JSON text."""
    pairs = row.get("history")
    if isinstance(pairs, str):
        pairs = _loads(pairs, "history") if pairs.strip() else None
    if pairs is None:
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise DataError("'history' must be a list of [user, assistant]")
    roles = ("user", "assistant")
    return [message(role, said, f"history {role}") for pair in pairs for role, said in zip(roles, pair, strict=True)]


def _joined(content: Any, field: str) -> Any:
    """OpenAI's ``[{"type": "text", "text": ...}, ...]`` as one text; anything else unchanged."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(f"'{field}' has a part of type {kind!r}; only text is supported")
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls in the form of chat templates, with arguments as an object; OpenAI writes them as JSON text."""
    if calls is None:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise DataError(f"'{where} tool_calls' must be a list of calls")
    parsed = []
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
        call_id = {"id": call["id"]} if call.get("id") is not None else {}
        parsed.append({**call_id, "type": "function", "function": {"name": name, "arguments": dict(arguments or {})}})
    return parsed


def _weight(turn: Mapping[str, Any], where: str) -> int | None:
    """OpenAI's ``weight`` (0 or 1), or ``train`` (true or false) as other tools write it; None if there is neither."""
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
