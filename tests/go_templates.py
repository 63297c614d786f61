"""Renders Go templates as far as ``Modelfile``s of alignkit use them, with the variables of Ollama."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

Messages = list[dict[str, str]]


def render(template: str, messages: Messages) -> str:
    """What Ollama renders: https://pkg.go.dev/text/template on ``.System`` and ``.Messages``."""
    template = re.sub(r"\s*\{\{-", "{{", template)  # before an action with a hyphen, white space is removed
    parts = re.split(r"(\{\{.*?\}\})", template, flags=re.S)
    system = "\n\n".join(each["content"] for each in messages if each["role"] == "system")
    tree = list(_block(iter(parts)))
    return "".join(_write(tree, {"System": system, "Messages": messages}))


Tree = list[object]  # texts, and (condition or range, body, else) of actions


def _block(parts: Iterator[str]) -> Iterator[object]:
    """The nodes up to ``end``; a branch ``else if`` is a node inside of ``else``."""
    for part in parts:
        action = part[2:-2].strip() if part.startswith("{{") else None
        if action is None:
            yield part
        elif action == "end" or action.startswith("else if"):
            yield ("stop", action)
            return
        elif action.startswith(("if ", "range ")):
            yield _branch(action, parts)
        else:
            yield ("value", action)


def _branch(action: str, parts: Iterator[str]) -> object:
    body = list(_block(parts))
    stop = body.pop()
    assert isinstance(stop, tuple)
    otherwise = [_branch(stop[1].removeprefix("else "), parts)] if stop[1] != "end" else []
    return ("branch", action, body, otherwise)


def _write(tree: Tree, scope: dict[str, object]) -> Iterator[str]:
    for node in tree:
        if isinstance(node, str):
            yield node
            continue
        assert isinstance(node, tuple)
        if node[0] == "value":
            yield str(_value(node[1], scope))
            continue
        _, action, body, otherwise = node
        if action.startswith("range "):
            turns = _value(action.removeprefix("range "), scope)
            assert isinstance(turns, list)
            for turn in turns:
                yield from _write(body, {**scope, "Role": turn["role"], "Content": turn["content"]})
        else:
            yield from _write(body if _holds(action.removeprefix("if "), scope) else otherwise, scope)


def _holds(condition: str, scope: dict[str, object]) -> bool:
    operator, *arguments = condition.split(maxsplit=1)
    if operator == "not":
        return not _value(arguments[0], scope)
    left, right = arguments[0].split(maxsplit=1)
    assert operator == "eq"
    return _value(left, scope) == _value(right, scope)


def _value(expression: str, scope: dict[str, object]) -> object:
    return scope[expression[1:]] if expression.startswith(".") else json.loads(expression)
