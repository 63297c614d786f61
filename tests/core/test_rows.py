"""Rows: which prompts are the same prompt."""

from __future__ import annotations

from typing import Any

from alignkit import Prompt


def test_prompts_with_other_tool_calls_or_tools_are_other_prompts() -> None:
    """The held-out split and PPO keep the rows of one prompt together."""

    def asked(city: str) -> list[Any]:
        function = {"name": "weather", "arguments": {"city": city}}
        return [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "content": "sunny", "name": "weather"},
        ]

    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    rome, oslo = Prompt(asked("Rome")), Prompt(asked("Oslo"))

    assert rome.key == Prompt(asked("Rome")).key != oslo.key
    assert Prompt(asked("Rome")[:1]).key == "Hi" != Prompt(asked("Rome")[:1], [tool]).key
